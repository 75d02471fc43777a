"""python -m ctsma_lab.tutorials: make the students' notebooks from those with solutions."""

from .students import write_student_versions

if __name__ == "__main__":
    write_student_versions()
