import inspect

import pytest

from lora_lightning import hookspecs

HOOKS = {
    name: function
    for name, function in vars(hookspecs).items()
    if inspect.isfunction(function) and hasattr(function, "lora_lightning_spec")
}


def test_there_are_hooks_and_fewer_than_ten():
    assert 0 < len(HOOKS) < 10


def test_every_public_function_is_a_hook():
    functions = {
        name
        for name, function in vars(hookspecs).items()
        if inspect.isfunction(function) and function.__module__ == hookspecs.__name__
    }
    assert functions == set(HOOKS)


@pytest.mark.parametrize("name", HOOKS)
def test_a_hook_says_what_it_is_and_when_it_runs(name):
    text = inspect.getdoc(HOOKS[name])
    assert text
    assert "Runs " in text
    assert name.startswith(hookspecs.NAMESPACE)


@pytest.mark.parametrize("name", HOOKS)
def test_the_guided_tour_names_every_hook(name):
    assert name in hookspecs.__doc__


@pytest.mark.parametrize("name", HOOKS)
def test_a_hook_is_typed_and_only_a_specification(name):
    signature = inspect.signature(HOOKS[name])
    assert signature.return_annotation is not inspect.Signature.empty
    with pytest.raises(NotImplementedError, match="a specification: plugins implement it"):
        HOOKS[name](*(None for _ in signature.parameters))
