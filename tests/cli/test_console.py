from lora_lightning.cli.console import PIPED_WIDTH, console, print_table


def test_a_long_cell_is_whole_where_the_output_is_no_terminal(capsys):
    path = "base.model." + "layer." * 15 + "query"
    print_table(("Layer", "Rank"), [(path, "8"), ("short", "16")])
    lines = capsys.readouterr().out.splitlines()
    assert console().width == PIPED_WIDTH
    assert any(path in line and line.rstrip().endswith("8") for line in lines)


def test_brackets_are_no_markup(capsys):
    print_table(("Type",), [("list[red]",), ("[bold]x[/bold]",)])
    out = capsys.readouterr().out
    assert "list[red]" in out
    assert "[bold]x[/bold]" in out
