"""Where the videos of a record file really lie: links are followed, and a folder is looked up
once."""

import os
from functools import cache
from pathlib import Path

from nanosport.records import Question


@cache
def real_folder(folder: str) -> str:
    return os.path.realpath(folder)


def real_video(path: Path, question: Question) -> str:
    """The real path of the video of a record in this file. Raises ValueError where it is none."""
    folder, name = os.path.split(os.path.join(path.parent, question.video))
    try:
        video = os.path.join(real_folder(folder), name)
        is_other = name in ("", ".", "..") or os.path.islink(video)
        return os.path.realpath(video) if is_other else video
    except ValueError as error:
        raise ValueError(
            f"{path}: video {question.video!r} of {question.id!r}: is no path ({error})"
        ) from None


def moved(video: str, old: Path, new: Path) -> str:
    """The video of a record in the folder `old`, as a file in the folder `new` has to name it; an
    absolute path stays."""
    if os.path.isabs(video):
        return video
    folder, name = os.path.split(os.path.join(old, video))
    return os.path.relpath(os.path.join(real_folder(folder), name), real_folder(str(new)))
