"""python -m ctsma_lab.tutorials: the students' notebooks and the teachers' table of answers."""

from .students import write_student_versions
from .teachers import write_answers

if __name__ == "__main__":
    write_student_versions()
    write_answers()
