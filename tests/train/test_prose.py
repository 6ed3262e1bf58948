from thrifty.train.prose import prose

SOURCE = '''"""A module about nothing at all, whose docstring is long enough to keep."""

# A comment of two lines, which belong together,
# because they follow each other.
x = 1  # not a whole line


class Pot:
    def boil(self, water, *, lid=None):
        """Bring the water to the boil.

        With a lid it is quicker, as everybody knows.
        """
        return "no prose"
'''


def test_docstrings_and_comments_stay_in_order_and_code_goes():
    assert prose(SOURCE) == (
        "A module about nothing at all, whose docstring is long enough to keep.\n\n"
        "A comment of two lines, which belong together,\nbecause they follow each other.\n\n"
        "boil(self, water, *, lid=None)\n\n"
        "   Bring the water to the boil.\n\n   With a lid it is quicker, as everybody knows."
    )


def test_what_does_not_parse_has_no_prose():
    assert prose("def (") == ""
