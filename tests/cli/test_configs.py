from pathlib import Path

import pytest

from lora_lightning.cli import configs
from lora_lightning.cli.configs import config_names, config_roots, find_config, is_path
from lora_lightning.errors import SettingsError


def test_a_file_in_the_working_folder_wins_over_a_name(config_folder, carried):
    Path("dora").touch()
    assert find_config("dora") == "dora"


def test_the_checkout_is_searched_only_beside_a_pyproject(tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "own.yaml").touch()
    (tmp_path / "package").mkdir()
    monkeypatch.setattr(configs, "_PACKAGE", tmp_path / "package")
    assert config_names() == []
    (tmp_path / "pyproject.toml").touch()
    assert config_names() == ["own"]
    assert find_config("own") == str(tmp_path / "configs" / "own.yaml")


def test_names_list_plain_configs_first(carried):
    assert config_names() == ["dora", "recipes/long", "strategies/ddp"]


def test_an_unknown_name_lists_the_configs(config_folder, carried):
    text = (
        'config "strategies/dpp": no file and no config of that name. Did you mean "strategies/ddp"? '
        "Configs: dora, recipes/long, strategies/ddp."
    )
    with pytest.raises(SettingsError) as caught:
        find_config("strategies/dpp")
    assert str(caught.value) == text


def test_an_unknown_path_names_the_nearest_file(config_folder):
    with pytest.raises(SettingsError, match=r'config "mien.yaml": no file .* Did you mean "mine.yaml"\?'):
        find_config("mien.yaml")


def test_a_run_folder_is_no_config(config_folder):
    with pytest.raises(
        SettingsError, match=r'"runs/rose/001" is a run folder; give runs/rose/001/config.yaml, --run or'
    ):
        find_config("runs/rose/001")


@pytest.mark.parametrize(
    ("value", "named"), [("rose", True), ("a folder/b.yaml", True), ("{a: 1}", False), ("a: 1", False), ("a\nb", False)]
)
def test_yaml_itself_is_no_path(value, named):
    assert is_path(value) is named
    assert named or find_config(value) == value


def test_the_configs_of_this_checkout():
    assert {"rose", "strategies/ddp"} <= set(config_names())
    assert all(root.name == "configs" for root in config_roots())
