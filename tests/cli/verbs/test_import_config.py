"""import-config: printed or written, what is lost named, and no file replaced; `doctor` finds nothing wrong with it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import yaml
from toy_runs import completion_file, decoder_folder

from lora_lightning.cli.main import main

AXOLOTL = """base_model: model
adapter: lora
lora_r: 4
lora_alpha: 8
lora_target_modules: [q_proj, v_proj]
datasets: [{path: rows.csv, type: {field_instruction: prompt, field_output: completion, format: "{instruction} "}}]
val_set_size: 0.3
sequence_len: 64
learning_rate: 1e-3
max_steps: 4
micro_batch_size: 4
logging_steps: 2
lr_groups: [1]
"""


def test_it_is_printed_or_written_checked_and_trained(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    decoder_folder(tmp_path / "model")
    completion_file(tmp_path / "rows.csv")
    Path("theirs.yml").write_text(AXOLOTL)
    assert main(["import-config", "theirs.yml"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("# From theirs.yml, of axolotl.")
    assert "#   lr_groups: [1]: nothing here stands for it" in printed
    assert main(["import-config", "theirs.yml", "--output", "ours.yaml"]) == 0
    out = capsys.readouterr().out
    assert "not carried over: lr_groups: nothing here stands for it" in out
    assert out.endswith("config: ours.yaml\n")
    assert Path("ours.yaml").read_text() == printed
    assert yaml.safe_load(printed)["data"]["init_args"]["prompt_template"] == "{prompt} "
    assert main(["import-config", "theirs.yml", "--output", "ours.yaml"]) == 2
    assert 'error: --output is "ours.yaml", which exists; name another file' in capsys.readouterr().err
    assert main(["import-config", "theirs.yml", "--output", "none/ours.yaml"]) == 2
    assert 'cannot write "none/ours.yaml": No such file' in capsys.readouterr().err
    flags = ["--config", "ours.yaml", "--trainer.accelerator", "cpu"]
    assert main(["doctor", *flags]) == 0, capsys.readouterr().out
    assert main(["fit", *flags]) == 0
    assert "rate: 0.001 of AdamW, from ours.yaml" in capsys.readouterr().out


def test_it_imports_no_torch(tmp_path):
    (tmp_path / "theirs.yml").write_text(AXOLOTL)
    code = (
        "import sys\nfrom lora_lightning.cli.main import main\n"
        f"main(['import-config', {str(tmp_path / 'theirs.yml')!r}])\n"
        "sys.exit(' '.join({'torch', 'lightning', 'transformers', 'jsonargparse'} & set(sys.modules)) or None)"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (process.returncode, process.stderr) == (0, "")
