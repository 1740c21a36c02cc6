from __future__ import annotations

import pytest
import yaml

from lora_lightning.cli.compare.arms import REFERENCES, Arm, around, check, dotted, from_file, from_flags
from lora_lightning.errors import SettingsError

KNOWN = ("LoRA", "DoRA", "MoELoRA")


def test_methods_and_settings_are_crossed():
    arms = from_flags(["LoRA", "DoRA"], ["model.method.rank=4,16"], False, KNOWN)
    assert [arm.name for arm in arms] == ["LoRA rank=4", "LoRA rank=16", "DoRA rank=4", "DoRA rank=16"]
    assert arms[3].words() == ["--model.method", "DoRA", "--model.method.rank", "16"]


def test_a_method_that_is_varied_comes_before_its_fields():
    (arm, _) = from_flags([], ["model.method.rank=4", "model.method=LoRA,MoELoRA"], False, KNOWN)
    assert arm.words() == ["--model.method", "LoRA", "--model.method.rank", "4"]


def test_values_side_by_side():
    arms = from_flags([], ["a.b=1,2", "c=x,null"], True, KNOWN)
    assert [arm.settings for arm in arms] == [{"a.b": 1, "c": "x"}, {"a.b": 2, "c": None}]
    with pytest.raises(SettingsError, match=r"each needs as many: a has 2, b has 3"):
        from_flags([], ["a=1,2", "b=1,2,3"], True, KNOWN)


def test_values_are_yaml():
    (arm, _) = from_flags([], ["model.targets=[query, value],all-linear"], False, KNOWN)
    assert arm.words() == ["--model.targets", '["query", "value"]']


def test_a_method_around_another_one_has_the_given_one_inside():
    wrapped = around(["Outer"], {"model.method": "LoRA", "model.method.rank": 4, "data.limit": 3})
    (arm, plain) = from_flags(["Outer", "LoRA"], [], False, (*KNOWN, "Outer"), wrapped)
    assert arm.words() == [
        "--model.method", "Outer", "--model.method.inner", "LoRA", "--model.method.inner.rank", "4",
    ]  # fmt: skip
    assert plain.words() == ["--model.method", "LoRA"]
    assert around(["Outer"], {"model.method": "Outer", "model.method.inner": "LoRA"}) == {}


def test_arms_without_an_adapter():
    linear, full = from_flags(["linear", "full"], [], False, KNOWN)
    assert linear.settings == REFERENCES["linear"]
    assert full.words() == ["--model.targets", "none", "--model.also_train", "all"]


@pytest.mark.parametrize(
    ("methods", "vary", "said"),
    [
        (["LoRa"], [], r'no method "LoRa"\. Did you mean "LoRA"\?'),
        ([], ["model.method=DORA"], r'no method "DORA"\. Did you mean "DoRA"\?'),
        ([], ["model.method.rank"], r"--vary model\.method\.rank=4,16,64"),
        ([], ["rank=[1"], r"write a setting and its values"),
    ],
)
def test_what_cannot_be_read(methods, vary, said):
    with pytest.raises(SettingsError, match=said):
        from_flags(methods, vary, False, KNOWN)


def test_a_file_of_arms(tmp_path):
    file = tmp_path / "arms.yaml"
    arms = {
        "small": {"model": {"method": {"rank": 4}}},
        "own": {"config": "dora", "model.optimizer": {"class_path": "SGD", "init_args": {"lr": 0.1}}},
        "full": None,
    }
    file.write_text(
        yaml.safe_dump({"config": "lora", "settings": {"data": {"limit": 64}}, "arms": arms}, sort_keys=False)
    )
    read = from_file(file, KNOWN)
    words, found = read.words, read.arms
    assert words == ["--config", "lora", "--data.limit", "64"]
    assert found[0] == Arm("small", {"model.method.rank": 4})
    assert found[1].words()[:3] == ["--config", "dora", "--model.optimizer"]
    assert found[2].settings == REFERENCES["full"]
    file.write_text("arms: [LoRA, DoRA]\n")
    assert [arm.name for arm in from_file(file, KNOWN).arms] == ["LoRA", "DoRA"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("arms: {}\n", r"it has no `arms`"),
        ("arms: {a: 3}\n", r"arms\.a is 3; it must be a mapping"),
        ("arms: 3\n", r"`arms` is 3"),
        ("arms: [LoRA]\nseed: 3\n", r'it takes no "seed"'),
        ("arms: [LoRA]\noptions: [budget]\n", r"`options` is \['budget'\]; it must be a mapping"),
        ("arms: [\n", r"cannot be read as YAML"),
    ],
)
def test_a_file_that_is_none(tmp_path, text, said):
    file = tmp_path / "arms.yaml"
    file.write_text(text)
    with pytest.raises(SettingsError, match=said):
        from_file(file, KNOWN)


def test_too_few_arms_and_names_that_meet():
    with pytest.raises(SettingsError, match=r"no two arms"):
        check([Arm("a")])
    with pytest.raises(SettingsError, match=r'"a/b" and a_b would share a folder'):
        check([Arm("a_b"), Arm("a/b")])
    with pytest.raises(SettingsError, match=r'"a" and another one would share a folder'):
        check([Arm("a"), Arm("a")])


def test_arms_that_are_compared_with_others_than_the_first(tmp_path):
    file = tmp_path / "arms.yaml"
    file.write_text("arms: {a: {}, b: {}, c: {against: b, model.method: DoRA}}\noptions: {seeds: 2}\n")
    read = from_file(file, KNOWN)
    assert read.arms[2] == Arm("c", {"model.method": "DoRA"}, (), "b")
    assert read.options == {"seeds": 2}
    check(read.arms)
    with pytest.raises(SettingsError, match=r'arms\.c\.against is "bb"; it must be another arm\. Did you mean "b"'):
        check([Arm("a"), Arm("b"), Arm("c", against="bb")])
    with pytest.raises(SettingsError, match=r"arms\.a\.against is .*Put that arm first"):
        check([Arm("a", against="b"), Arm("b")])


def test_nested_settings():
    assert dotted({"a": {"b": {"class_path": "X"}, "c": 1}, "d.e": {"f": 1}}) == {
        "a.b": {"class_path": "X"},
        "a.c": 1,
        "d.e": {"f": 1},
    }
