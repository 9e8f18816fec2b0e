"""Every key of a job has a description, which the reference shows."""

from __future__ import annotations

from collections.abc import Iterator

from distmeta.config.job import Job
from distmeta.config.sections import Section


def find_sections(section: type[Section]) -> Iterator[type[Section]]:
    for subclass in section.__subclasses__():
        yield subclass
        yield from find_sections(subclass)


def test_every_job_key_has_a_description() -> None:
    sections = list(find_sections(Section))
    assert Job in sections
    for section in sections:
        for key, field in section.model_fields.items():
            assert field.description, f"{section.__name__}.{key}"


def test_every_section_has_a_description() -> None:
    for section in find_sections(Section):
        assert section.__doc__, section.__name__
