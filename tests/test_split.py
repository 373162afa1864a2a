"""Splits: nothing leaks, the targets are kept, and every run gives the same bytes."""

import json
import os
import random
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

import pytest

from data_prep import difficulty, leaks, split
from data_prep.leaks import SPLITS, check_splits, tied
from data_prep.sources import match_group
from data_prep.split import Config, fill, near_duplicates
from nanosport.env.scoring import normalise
from nanosport.records import parse_question, read_questions

ROOT = Path(__file__).parents[1]
LONG = "a long answer that nobody could check by rule since it has far too many words"
SOCCERNET = "materials/q10/SoccerNet-v2/england_epl_2014-2015/2015-02-21 - 18-00 Chelsea 1 - 1 Burnley/1_05_10.mp4"
REPLAY = "england_epl_2014-2015/2015-02-21_chelsea-fc-burnley-fc-premier-league/1-half.mkv"
OTHER_DAY = (
    "england_epl_2014-2015/2015-03-01_chelsea-fc-tottenham-hotspur-premier-league/1-half.mkv"
)


def record(id: str, **more) -> dict:
    """A choice about a video of its own."""
    row = {
        "id": id,
        "video": f"clips/{id}.mp4",
        "sport": "golf",
        "dimension": "rules",
        "source": id.partition("/")[0],
    }
    return row | {"question": f"Which is it, {id}?", "options": ["yes", "no"], "answer": "B"} | more


def written(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make(path: Path, *rows: dict, **flags) -> tuple[dict[str, list[dict]], dict]:
    """(rows by split, split.json) of a run over these rows; `path` is a folder."""
    split.main(Config((written(path / "records.jsonl", list(rows)),), path / "out", **flags))
    return result(path / "out")


def result(out: Path) -> tuple[dict[str, list[dict]], dict]:
    lines = {name: (out / f"{name}.jsonl").read_text().splitlines() for name in SPLITS}
    return {name: list(map(json.loads, those)) for name, those in lines.items()}, json.loads(
        (out / "split.json").read_text()
    )


def ids(rows: list[dict]) -> set[str]:
    return {row["id"] for row in rows}


def counts(rows: Iterable[dict]) -> Counter:
    return Counter(row["source"] for row in rows)


def many(source: str, num: int, size: int = 1, **more) -> list[dict]:
    """`num` records in groups of `size`."""
    return [
        record(f"{source}/{k}", group=f"{source}/group {k // size}", **more) for k in range(num)
    ]


# What must stay together.


def test_what_shares_a_group_or_a_video_stays_together(tmp_path):
    rng, rows = random.Random(0), []
    for k in range(600):
        rows.append(
            record(
                f"a/{k}", group=f"g{rng.randrange(250)}", video=f"clips/{rng.randrange(400)}.mp4"
            )
        )
    files, report = make(tmp_path, *rows)
    assert all(files.values()) and sum(map(len, files.values())) == 600 - len(
        report["near_duplicates"]
    )
    for field in ("group", "video"):
        places = defaultdict(set)
        for name, those in files.items():
            for row in those:
                places[row[field]].add(name)
        assert all(len(where) == 1 for where in places.values()), field


def test_ties_are_the_connected_components():
    rng = random.Random(1)
    for _ in range(50):
        ties = [[("g", rng.randrange(12)), ("v", rng.randrange(12))] for _ in range(10)]
        reach = [[bool(set(a) & set(b)) for b in ties] for a in ties]
        for k in range(10):  # Warshall
            for a in range(10):
                for b in range(10):
                    reach[a][b] |= reach[a][k] and reach[k][b]
        found = tied(ties)
        assert [[x == y for y in found] for x in found] == reach


def test_one_video_under_two_names_is_one_video(tmp_path):
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "v.mp4").touch()
    (tmp_path / "link.mp4").symlink_to("clips/v.mp4")
    (tmp_path / "folder").symlink_to("clips")
    names = [
        "clips/v.mp4",
        "link.mp4",
        "folder/v.mp4",
        "clips/../clips/v.mp4",
        str(tmp_path / "clips" / "v.mp4"),
    ]
    rows = [record(f"a/{k}", video=video, group=f"g{k}") for k, video in enumerate(names)]
    files, _ = make(tmp_path, *rows)
    assert sorted(map(len, files.values())) == [0, 0, 5]


def test_equal_relative_names_in_two_folders_are_two_videos(tmp_path):
    files = [
        written(tmp_path / f / "r.jsonl", [record(f"{f}/{k}", video=f"{k}.mp4") for k in range(90)])
        for f in ("a", "b")
    ]
    split.main(Config(tuple(files), tmp_path / "out"))
    rows, _ = result(tmp_path / "out")
    where = {row["id"]: name for name, those in rows.items() for row in those}
    assert any(where[f"a/{k}"] != where[f"b/{k}"] for k in range(90))
    assert all(
        row.get("group", row["video"]) == row["video"] for those in rows.values() for row in those
    )


# Test material.


def soccer() -> list[dict]:
    """A SoccerBench clip of a match that SoccerReplay-1988 has too, and what must not be mistaken
    for it."""
    rows = [record("soccerbench/q10/0", group=match_group(SOCCERNET))]
    rows += [
        record(
            f"soccerreplay/same/{k}",
            group=match_group(REPLAY),
            video="half.mkv",
            question=f"Who, {k}?",
        )
        for k in range(20)
    ]
    rows += [record("xfoul/0", group="another name", video="half.mkv")]  # tied through the video
    return rows + [
        record(f"soccerreplay/other/{k}", group=match_group(OTHER_DAY) + f"-{k}") for k in range(40)
    ]


@pytest.mark.parametrize("test", [0, 5, 6700])
def test_a_soccerbench_match_is_never_trained_on(tmp_path, test, capsys):
    assert match_group(SOCCERNET) != match_group(REPLAY)  # the sources spell a match in two ways
    files, report = make(tmp_path, *soccer(), *many("sportu", 200), test=test)
    trained = ids(files["sft"]) | ids(files["rl"])
    assert not [id for id in trained if "soccerbench" in id or "same" in id or "xfoul" in id]
    assert any("other" in id for id in trained)
    own = {row["id"] for row in soccer() if "other" not in row["id"]}
    tied_ones, in_test = (
        report["tied_to_test_only"],
        counts(row for row in files["test"] if row["id"] in own),
    )
    assert sum(tied_ones["soccerreplay"].values()) == 20 and sum(tied_ones["xfoul"].values()) == 1
    assert tied_ones["soccerreplay"].get("test", 0) == in_test["soccerreplay"]
    assert (
        f"tied to a test-only source: 21, of which {in_test['soccerreplay'] + in_test['xfoul']} in test"
        in capsys.readouterr().out
    )
    assert report["held_out"] == [match_group(SOCCERNET)]
    if test == 6700:
        assert in_test == {"soccerbench": 1, "soccerreplay": 20, "xfoul": 1}


def test_a_near_duplicate_does_not_let_go_of_test_material(tmp_path):
    rows = [
        record("a/0", video="v.mp4", question="Who?", group="one"),
        record("soccerbench/0", video="v.mp4", question="who", group="two"),
        *many("b", 100),
        record("a/1", group="two"),
    ]
    files, report = make(tmp_path, *rows)
    assert report["near_duplicates"] == [{"kept": "soccerbench/0", "dropped": "a/0"}]
    assert {"soccerbench/0", "a/1"} <= ids(files["test"])


def test_it_writes_nothing_that_leaks(tmp_path, monkeypatch):
    # nothing is held together any more
    monkeypatch.setattr(leaks, "tied", lambda ties: list(range(len(list(ties)))))
    with pytest.raises(ValueError, match="is in (sft|rl) .* and in (rl|test)"):
        make(tmp_path, *many("a", 300, size=10))
    assert not list((tmp_path / "out").iterdir())


@pytest.fixture
def clean(tmp_path) -> Path:
    """The folder of a clean split with a SoccerBench match in test."""
    make(tmp_path, *soccer(), *many("sportu", 200, size=2))
    split.main(Config(check=tmp_path / "out"))
    return tmp_path / "out"


def edit(path: Path, *rows: dict) -> None:
    with open(path, "a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))


def caught(folder: Path) -> str:
    with pytest.raises(ValueError) as by_command:
        split.main(Config(check=folder))
    assert "\n" not in str(by_command.value)
    return str(by_command.value)


def test_a_group_in_two_splits_is_caught(clean):
    group = result(clean)[0]["sft"][0]["group"]
    edit(clean / "rl.jsonl", record("new", group=group))
    with pytest.raises(ValueError) as found:
        check_splits([clean / "sft.jsonl", clean / "rl.jsonl"])
    assert str(found.value) == caught(clean)
    assert f"'group {group}' is in sft" in caught(clean) and "and in rl ('new')" in caught(clean)


def test_a_video_in_two_splits_is_caught(clean):
    row = result(clean)[0]["rl"][0]
    edit(clean / "test.jsonl", record("new", group="new", video=f"../out/{row['video']}"))
    assert (
        Path(row["video"]).name in caught(clean)
        and "is in rl (" in caught(clean)
        and "and in test ('new')" in caught(clean)
    )


def test_a_soccerbench_question_in_training_is_caught(clean):
    edit(clean / "sft.jsonl", record("soccerbench/new"))
    assert (
        "'soccerbench/new' is in sft, but its source 'soccerbench' is test material only"
        in caught(clean)
    )


def test_a_soccerreplay_question_on_a_soccerbench_match_is_caught(clean):
    edit(
        clean / "rl.jsonl", record("soccerreplay/new", group=match_group(REPLAY.replace("fc-", "")))
    )  # a third spelling
    with pytest.raises(
        ValueError, match="'match 2015-02-21 burnley' is in rl .'soccerreplay/new'. and in test "
    ):
        check_splits(clean / f"{name}.jsonl" for name in SPLITS)
    rows = [row for row in result(clean)[0]["test"] if row["source"] == "sportu"]
    written(
        clean / "test.jsonl", rows
    )  # no question on the match is left in test, but split.json knows it
    check_splits(clean / f"{name}.jsonl" for name in SPLITS)
    assert "is in rl ('soccerreplay/new')" in caught(clean) and "test-only" in caught(clean)
    (clean / "split.json").write_text('{"held_out": 3}')
    assert "held_out" in caught(clean)


@pytest.mark.parametrize("split", ["train/", "train_720p/", "Train\\"])
def test_mvfouls_clips_in_a_soccerbench_shaped_file_are_found(tmp_path, split):
    """By the action's name, though the two downloads lie apart and one does not know the match."""
    fouls = [record(f"xfoul/{n}", video=f"fouls/{split}action_{n}/clip_1.mp4") for n in range(30)]
    clip = "bench/Dataset/video/SoccerNet/mvfouls/train/action_7/clip_1.mp4"
    match = "soccer/england-epl-2014-2015/2015-02-21-18-00-chelsea-1-1-burnley"
    bench = record("soccerbench/video_600/0", video=clip, group=match)
    splits, report = make(tmp_path, bench, *fouls, *many("sportu", 60))
    assert not ids(splits["sft"] + splits["rl"]) & {"xfoul/7", "soccerbench/video_600/0"}
    assert "xfoul/6" in ids(splits["sft"] + splits["rl"] + splits["test"])
    assert "mvfoul/train/action_7" in report["held_out"]

    out = tmp_path / "out"
    edit(out / "rl.jsonl", record("xfoul/new", video="../other/Train/action_7/clip_0.mp4"))
    assert "'group mvfoul/train/action_7' is in rl ('xfoul/new')" in caught(out)
    written(out / "test.jsonl", [row for row in splits["test"] if "bench" not in row["id"]])
    assert "test-only source has it" in caught(out)
    inside = parse_question(record("xfoul/inside", video="action_7/clip_0.mp4"))
    ties = leaks.question_ties(inside, f"/data/train_720p/{inside.video}")
    assert ("group", "mvfoul/train/action_7") in ties


def test_a_video_that_is_no_path_is_caught(clean):
    edit(clean / "test.jsonl", record("new", video="nul\0/a.mp4"))
    assert "test.jsonl: video 'nul\\x00/a.mp4' of 'new': is no path" in caught(clean)


def test_a_repeated_id_is_caught(clean):
    edit(clean / "test.jsonl", record(result(clean)[0]["sft"][0]["id"]))
    assert "sft.jsonl and in " in caught(clean) and "test.jsonl" in caught(clean)


# Targets.


def test_the_same_bytes_in_whatever_order(tmp_path):
    rows = (
        soccer()
        + many("a", 300, size=3)
        + many("b", 100, answer=LONG, options=[])
        + [record("b/twin", video="clips/b/7.mp4", question="Which is it, b 7")]
    )
    random.Random(0).shuffle(rows)
    one, two, both = (
        written(tmp_path / name, those)
        for name, those in (("1.jsonl", rows[:200]), ("2.jsonl", rows[200:]), ("3.jsonl", rows))
    )
    runs = [((one, two), 0), ((two, one), 0), ((one, two), 1)]
    found = []
    for files, seed in runs:
        split.main(Config(files, tmp_path / "out", sft=40, rl=170, test=30, seed=seed))
        found.append({path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()})
    assert found[0].keys() == {"sft.jsonl", "rl.jsonl", "test.jsonl", "split.json"}
    assert found[0] == found[1]
    assert all(found[0][name] != found[2][name] for name in found[0])
    split.main(
        Config((both,), tmp_path / "out", sft=40, rl=170, test=30)
    )  # nor do the borders of files matter
    assert all(
        (tmp_path / "out" / f"{name}.jsonl").read_bytes() == found[0][f"{name}.jsonl"]
        for name in SPLITS
    )


def test_a_smaller_scale_gives_subsets(tmp_path):
    rows = (
        soccer()
        + many("a", 900, size=4)
        + many("b", 300)
        + many("c", 30)
        + many("d", 200, answer=LONG, options=[])
    )
    targets = dict(sft=100, rl=420, test=50, quota=("b=0.3",))
    larger = None
    for scale in (1.0, 0.61, 0.6, 0.1, 0.01):
        files, report = make(tmp_path, *rows, scale=scale, **targets)
        assert (
            {name: len(those) for name, those in files.items()}
            == {n: round(targets[n] * scale) for n in SPLITS}
            == report["targets"]
        )
        assert larger is None or all(ids(files[name]) <= ids(larger[name]) for name in SPLITS)
        larger = files


def test_a_starved_source_leaves_its_share_to_the_others(tmp_path):
    rows = many("large", 3000) + many("middle", 2000) + many("starved", 80, size=2)
    files, report = make(tmp_path, *rows, sft=150, rl=630, test=66)
    assert [len(files[name]) for name in SPLITS] == [150, 630, 66]
    for name in SPLITS:
        found = counts(files[name])
        assert (
            0 < found["starved"] < len(files[name]) / 3
            and abs(found["large"] - found["middle"]) <= 1
        )
        assert (
            report["reached"][name]["source"] == found
            and report["reached"][name]["questions"] == found.total()
        )
        assert (
            report["reached"][name]["dimension"]
            == {"rules": found.total()}
            == {"rules": report["reached"][name]["sport"]["golf"]}
        )
    assert sum(counts(files[name])["starved"] for name in SPLITS) == 80
    assert report["dropped"]["beyond the target"] == {
        "large": 3000 - sum(counts(f)["large"] for f in files.values())
    } | {"middle": 2000 - sum(counts(f)["middle"] for f in files.values())}


def test_a_quota_is_a_share_of_each_split(tmp_path):
    rows = many("a", 2000) + many("b", 2000) + many("c", 2000)
    files, _ = make(tmp_path, *rows, sft=100, rl=400, test=40, quota=("a=0.5", "b=0"))
    assert counts(files["sft"]) == {"a": 50, "c": 50} and counts(files["rl"]) == {
        "a": 200,
        "c": 200,
    }
    files, _ = make(
        tmp_path, *many("a", 2000), *many("b", 90), sft=100, rl=400, test=40, quota=("a=0.1",)
    )
    assert (
        counts(files["rl"])["a"] == 400 - counts(files["rl"])["b"]
        and 60 < counts(files["rl"])["b"] < 90
    )


def test_filling_is_fair_and_never_takes_back():
    have, weight = {"a": 1000, "b": 7, "c": 300, "d": 50}, {"a": 0.5, "b": 0.2, "c": 0.2, "d": 0.1}
    before = Counter()
    for total in range(1, 1400):
        taken = fill(total, have, weight)
        assert (
            taken.total() == min(total, 1357)
            and taken >= before
            and all(taken[s] <= have[s] for s in have)
        )
        before = taken
    assert fill(30, have, weight) == {"a": 15, "b": 6, "c": 6, "d": 3}
    assert (
        fill(100, have, weight)["b"] == 7 and abs(fill(100, have, weight)["a"] - 93 * 5 / 8) < 1
    )  # the ratio of the others is 5 : 2 : 1
    assert fill(10**12, have, weight) == have and not fill(5, {"a": 3}, {"a": 0.0})


def test_rl_has_only_answers_that_can_be_checked(tmp_path):
    rows = many("long", 300, answer=LONG, options=[]) + many(
        "short", 300, answer="twelve " * 12, options=[]
    )
    rows += many("number", 300, answer="7.5", kind="number", options=[]) + many(
        "span", 300, answer="1-2", kind="span", options=[]
    )
    rows += [
        record(
            f"mixed/{k}", group=f"m{k // 6}", **({"answer": LONG, "options": []} if k % 3 else {})
        )
        for k in range(600)
    ]
    files, report = make(tmp_path, *rows)
    assert not [row for row in files["rl"] if row["answer"] == LONG]
    assert {"short", "number", "span", "mixed"} == counts(files["rl"]).keys()
    assert (
        counts(files["sft"])["long"] + counts(files["test"])["long"] == 300
    )  # nothing is wasted on RL
    assert 15 < counts(files["test"])["long"] < 35
    missed = report["dropped"]["open answer too long for RL"]
    assert missed.keys() == {"mixed"} and missed["mixed"] == 600 - sum(
        counts(f)["mixed"] for f in files.values()
    )


@pytest.mark.parametrize("size", [1, 5])
@pytest.mark.parametrize("long", [0, 0.4])
def test_too_few_questions_keep_the_ratio(tmp_path, size, long, capsys):
    rng = random.Random(3)
    rows = many("a", 1500, size=size) + many("b", 500, size=size)
    rows = [
        row | ({"answer": LONG, "options": []} if rng.random() < long and size > 1 else {})
        for row in rows
    ]
    files, report = make(tmp_path, *rows)
    total = sum(map(len, files.values()))
    for name, target in (("sft", 15000), ("rl", 63000), ("test", 6700)):
        assert len(files[name]) / total == pytest.approx(target / 84700, abs=0.015)
    line = [line for line in capsys.readouterr().out.splitlines() if "too few" in line]
    assert len(line) == 1 and all(
        f"{name} {len(files[name]):,} of {report['targets'][name]:,}" in line[0] for name in SPLITS
    )


def test_a_large_group_does_not_starve_a_split(tmp_path):
    rows = [
        record(f"a/{k}", group=f"g{max(0, k - 99) // 20}") for k in range(160)
    ]  # groups of 119, 20, 20 and 1
    for seed in range(6):  # whatever comes first by rank
        files, _ = make(tmp_path, *rows, seed=seed)
        assert [len(files[name]) for name in ("rl", "sft", "test")] in (
            [119, 21, 20],
            [119, 20, 21],
            [120, 20, 20],
        )


# Near-duplicates.


def test_near_duplicates_of_one_clip_are_dropped(tmp_path):
    long = " ".join(f"word{k}" for k in range(20))
    rows = [
        record("a/1", video="v.mp4", question="The player serves first?"),
        record("a/2", video="v.mp4", question="A player SERVES first!"),
        record("a/3", video="v.mp4", question="The player serves second?"),
        record(
            "a/4", video="v.mp4", span_s=[0, 3], question="The player serves first?"
        ),  # another clip
        record("a/5", video="w.mp4", question="The player serves first?"),  # another video
        record("a/6", video="v.mp4", question=long),
        record("a/7", video="v.mp4", question=long + " more"),  # 20 of 21
        record("a/8", video="v.mp4", question=long + " more and much else"),  # 20 of 24
        record("a/9", video="v.mp4", question="?"),
    ]
    files, report = make(tmp_path, *rows)
    assert report["near_duplicates"] == [
        {"kept": "a/1", "dropped": "a/2"},
        {"kept": "a/6", "dropped": "a/7"},
    ]
    assert report["dropped"]["near-duplicate"] == {"a": 2}
    assert set().union(*map(ids, files.values())) == {
        "a/1",
        "a/3",
        "a/4",
        "a/5",
        "a/6",
        "a/8",
        "a/9",
    }
    assert (
        report["same_text_in_several_groups"] == 4
    )  # a/1, a/2 and a/4 are one group's, a/5 is another's


def test_words_in_another_order_may_be_another_question(tmp_path):
    options = {"video": "v.mp4", "options": ["yes", "no"]}
    rows = [
        record(
            "a/1", question="Does the white team score before the red team?", **options, answer="A"
        ),
        record(
            "a/2", question="Does the red team score before the white team?", **options, answer="B"
        ),
        record("a/3", question="Does white team score before red team?", **options, answer="A"),
    ]
    ask = "At which frame does this happen: near deuce {} groundstroke cross-court approach in? "
    ask += "Within 6 frames counts as right."
    number = {"video": "v.mp4", "options": [], "kind": "number"}
    rows += [
        record(f"b/{k}", question=ask.format(stroke), answer=frame, **number)
        for k, (stroke, frame) in enumerate(
            zip(("forehand", "backhand", "volley"), ("25", "35", "25"))
        )
    ]
    _, report = make(tmp_path, *rows)
    assert report["near_duplicates"] == [
        {"kept": "a/1", "dropped": "a/3"}, {"kept": "b/0", "dropped": "b/2"}
    ]  # fmt: skip


def test_pass_rates_are_of_the_questions_that_were_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(difficulty, "measure", lambda *arguments: [])
    data = written(tmp_path / "rl.jsonl", [record("a/1")])
    difficulty.main(difficulty.Config(data, tmp_path / "measured.jsonl"))
    difficulty.main(difficulty.Config(data, tmp_path / "measured.jsonl"))
    written(data, [record("a/1", answer="A")])
    with pytest.raises(ValueError, match="measured under"):
        difficulty.main(difficulty.Config(data, tmp_path / "measured.jsonl"))


def test_near_duplicates_are_those_of_all_pairs():
    rng, texts = random.Random(4), []
    for _ in range(400):
        words = [f"w{rng.randrange(30)}" for _ in range(rng.randrange(1, 30))]
        texts += [
            " ".join(words),
            " ".join(rng.sample(words, len(words) - rng.randrange(2)) + ["x"] * rng.randrange(2)),
        ]
    kept, expected = [], []
    for k, words in enumerate(set(normalise(text)) for text in texts):
        twin = next(
            (
                j
                for j, other in kept
                if other | words and len(other & words) / len(other | words) >= 0.9
            ),
            None,
        )
        if twin is None:
            kept.append((k, words))
        else:
            expected.append((twin, k))
    assert near_duplicates(texts) == expected and len(expected) > 100


# Files.


def test_videos_are_found_from_the_new_folder(tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "linked").symlink_to("../store")
    rows = []
    for k in range(60):
        folder = ("data/clips", "store", "data/linked")[k % 3]
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / f"{k}.mp4").write_text(str(k))
        video = (
            f"clips/{k}.mp4",
            str(tmp_path / "store" / f"{k}.mp4"),
            f"linked/../store/{k}.mp4",
        )[k % 3]
        rows.append(
            record(
                f"a/{k}",
                video=video,
                **({"group": video} if k % 2 else {}),
                provenance="é\u2028<|",
                window=[1, 2],
            )
        )
    files = written(tmp_path / "data" / "records.jsonl", rows)
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to("real")
    split.main(Config((files,), tmp_path / "out" / "deeper"))
    given, seen = {row["id"]: row for row in rows}, 0
    for name in SPLITS:
        for question in read_questions(tmp_path / "out" / "deeper" / f"{name}.jsonl"):
            seen += 1
            assert Path(question.video).read_text() == question.id.partition("/")[2]
        for row in result(tmp_path / "out" / "deeper")[0][name]:
            assert {**row, "video": 0, "group": 0} == {**given[row["id"]], "video": 0, "group": 0}
            assert row.get("group", row["video"]) == row["video"]
    assert seen == 60


def test_a_failed_run_leaves_the_old_files(tmp_path):
    make(tmp_path, *many("a", 100))
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(ValueError):
        make(tmp_path, *many("b", 100), record("b/3"))
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_a_target_of_0_gives_an_empty_file(tmp_path):
    files, _ = make(tmp_path, *many("a", 100), sft=0, rl=0, test=50)
    assert [len(files[name]) for name in SPLITS] == [0, 0, 50]
    split.main(Config(check=tmp_path / "out"))


def test_an_id_in_two_files_is_refused(tmp_path):
    files = [written(tmp_path / f"{n}.jsonl", [record("a/1"), record(f"{n}/2")]) for n in "xy"]
    with pytest.raises(ValueError) as found:
        split.main(Config(tuple(files), tmp_path / "out"))
    assert all(part in str(found.value) for part in ("'a/1'", "x.jsonl", "y.jsonl"))


@pytest.mark.parametrize(
    "flags, words",
    [
        ({"records": ()}, "--out DIR, or --check DIR"),
        ({"out": None}, "--out DIR, or --check DIR"),
        ({"check": Path("x")}, "--check DIR: stands alone"),
        ({"records": (Path("missing.jsonl"),)}, "missing.jsonl: no such file"),
        ({"scale": 0.0}, "--scale 0.0"),
        ({"scale": 1.5}, "--scale 1.5"),
        ({"scale": float("nan")}, "--scale nan"),
        ({"sft": -1}, "--sft -1"),
        ({"sft": 0, "rl": 0, "test": 0}, "must be above 0"),
        ({"seed": -1}, "--seed -1"),
        ({"quota": ("a",)}, "--quota a: must be NAME=SHARE"),
        ({"quota": ("nobody=0.5",)}, "one of 'a', 'b'"),
        ({"quota": ("a=0.2", "a=0.3")}, "once each"),
        ({"quota": ("a=much",)}, "--quota a=much: the share"),
        ({"quota": ("a=nan",)}, "--quota a=nan: the share"),
        ({"quota": ("a=-0.1",)}, "--quota a=-0.1: the share"),
        ({"quota": ("a=0.7", "b=0.7")}, "more than 1"),
        ({"row": {"video": "nul\0/a.mp4"}}, "is no path"),
        ({"row": {"answer": "Z"}}, "records.jsonl, line 9: not a question: answer 'Z'"),
        ({"row": {"messages": [], "question": record("b/7")}}, "'b/7' is a trajectory"),
        ({"out": Path("file")}, "is a file"),
    ],
)
def test_wrong_use_gives_one_clear_line(tmp_path, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    bad = flags.pop("row", {})
    rows = [*many("a", 8), bad if "messages" in bad else record("b/0", **bad)]
    flags = {"records": (written(tmp_path / "records.jsonl", rows),), "out": Path("out")} | flags
    with pytest.raises(ValueError) as found:
        split.main(Config(**flags))
    assert words in str(found.value) and "\n" not in str(found.value)
    assert not Path("out").exists()


def test_it_does_not_write_over_its_input(tmp_path):
    path = written(tmp_path / "rl.jsonl", many("a", 9))
    with pytest.raises(ValueError, match="rl.jsonl would be written over"):
        split.main(Config((path,), tmp_path))


def call(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "data_prep.split", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)


def test_the_command(tmp_path):
    path = written(tmp_path / "r.jsonl", many("a", 300, size=3) + many("b", 300, size=3))
    done = call(
        path,
        "--out",
        tmp_path / "out",
        "--scale",
        "0.01",
        "--quota",
        "a=0.25",
        "b=0.75",
        "--seed",
        "3",
        "--test",
        "1000",
    )
    assert done.returncode == 0, done.stderr
    files, report = result(tmp_path / "out")
    assert report["targets"] == {"sft": 150, "rl": 630, "test": 10} and report["quota"] == [
        "a=0.25",
        "b=0.75",
    ]
    edit(tmp_path / "out" / "test.jsonl", record("new", group=files["rl"][0]["group"]))
    done = call("--check", tmp_path / "out")
    assert (
        done.returncode == 1
        and done.stderr.startswith("error: 'group ")
        and done.stderr.count("\n") == 1
    )
    with pytest.raises(ValueError, match="sft.jsonl: no such file; --check takes a folder"):
        split.main(Config(check=tmp_path))


def test_memory_does_not_grow_with_the_texts(tmp_path):
    """20,000 records here, for the time. 100,000 took 20 s on one slow core, and 105 MB besides the
    imports."""
    rng = random.Random(5)
    with open(tmp_path / "records.jsonl", "w") as file:
        for k in range(20_000):
            group = f"s{k % 10}/{rng.randrange(3000)}"
            row = record(
                f"s{k % 10}/{k}",
                group=group,
                video=f"{group}/{k % 4}.mp4",
                provenance="words " * 800,
            )
            file.write(json.dumps(row) + "\n")
    script = """
import re, sys
from pathlib import Path
from data_prep import split
status = Path("/proc/self/status")  # ru_maxrss would begin with the parent's
peak_mb = lambda: int(re.search(r"VmHWM:\\s*(\\d+)", status.read_text())[1]) / 1024
before = peak_mb()
split.main(split.Config((Path(sys.argv[1]),), Path(sys.argv[2])))
print(before, peak_mb())
"""
    command = [sys.executable, "-c", script, str(tmp_path / "records.jsonl"), str(tmp_path / "out")]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    before, after = map(float, done.stdout.splitlines()[-1].split())
    assert after - before < 50, "MB, for a file of 95"
    assert (tmp_path / "records.jsonl").stat().st_size > 90e6
