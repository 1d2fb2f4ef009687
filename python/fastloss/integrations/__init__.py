"""Functions of other libraries' names and signatures, to change one import. They import none of those libraries."""
