"""First names that are one token in most tokenizers and that English texts use mostly for one gender."""

WOMEN = (
    *("Mary", "Sarah", "Anna", "Laura", "Emma", "Alice", "Julia", "Jane", "Lisa", "Rachel", "Susan", "Karen"),
    *("Linda", "Maria", "Emily", "Helen", "Barbara", "Elizabeth", "Rebecca", "Jessica", "Catherine", "Margaret"),
    *("Amy", "Kate", "Nancy", "Amanda", "Michelle", "Jennifer", "Diana", "Ruth"),
)
MEN = (
    *("John", "James", "David", "Michael", "Peter", "Paul", "Robert", "Thomas", "William", "Richard", "Henry"),
    *("George", "Daniel", "Matthew", "Andrew", "Kevin", "Brian", "Steven", "Edward", "Charles", "Joseph", "Frank"),
    *("Tom", "Jack", "Bob", "Adam", "Simon", "Eric", "Patrick", "Martin"),
)
