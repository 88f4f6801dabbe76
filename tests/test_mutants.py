"""A checkpoint that is not whole or not right is refused by one sentence, or gives the logits of the sound one: in
transformers, in `bpdq inspect`, and in what the plugin checks before vLLM loads."""

import random
import re
import shutil
import time

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import mutant_files
import mutants
from bpdq_kernels import format as bpdq_format
from bpdq_quantizer.checkpoint.inspection import inspect
from bpdq_quantizer.checkpoint.loader import is_checkpoint, load_model
from bpdq_quantizer.errors import InputError
from vllm_bpdq.checkpoint import check_folder

IDS = torch.arange(24)[None] * 7 % 380
SECONDS = 20  # for all that one mutant is asked, on a busy machine
NAMED = re.compile(r"safetensors|\.json|quantization_config|model\.|lm_head|/")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return mutant_files.bases(tmp_path_factory.mktemp("sound"))


@torch.inference_mode()
def logits(model):
    return model.eval()(IDS).logits


@pytest.fixture(scope="module")
def sound(folders):
    return {base: logits(load_model(str(folder))) for base, folder in folders.items()}


def ask(question):
    """The sentence that refuses, or what is answered; anything else that is raised fails the test."""
    try:
        return question()
    except InputError as e:
        sentence = " ".join(str(e).split())
        assert NAMED.search(sentence), sentence
        assert len(sentence) < 1500, sentence
        return sentence


def plugin(folder):
    """What the plugin says once vLLM, which has checks of its own for that, has read config.json."""
    try:
        config = AutoConfig.from_pretrained(folder)
        quantization = config.quantization_config
    except Exception as e:
        return f"{type(e).__name__}"
    return ask(lambda: check_folder(folder, config, bpdq_format.parse(quantization)))


def unaided(folder):
    """transformers without `load_model`: what is wrong with config.json it says in its own words. It asks nobody where
    that does not speak of BPDQ."""
    try:
        if not is_checkpoint(str(folder)):
            return "not BPDQ"
        return logits(AutoModelForCausalLM.from_pretrained(folder))
    except Exception as e:
        return f"{type(e).__name__}: {e}"


def faults(mutant, folder, expected):
    """What of the answers to a mutant is wrong."""
    started = time.monotonic()
    answers = {"load_model": ask(lambda: logits(load_model(str(folder)))), "from_pretrained": unaided(folder)}
    answers["inspect"] = ask(lambda: inspect(folder))
    answers["plugin"] = plugin(folder)
    found = []
    for who in ("load_model", "from_pretrained"):
        answer = answers[who]
        if isinstance(answer, str):
            continue
        if not torch.equal(answer, expected):
            found.append(f"{who} answers wrongly")
        elif not mutant.right:
            found.append(f"{who} takes it")
    if not mutant.right and answers["plugin"] is None:
        found.append("the plugin takes it")
    if mutant.name.startswith("fine"):
        found += [f"{who}: {answer}" for who, answer in answers.items() if isinstance(answer, str)]
    if time.monotonic() - started > SECONDS:
        found.append("takes too long")
    return found


def wrong_ones(chosen, folders, sound, tmp_path):
    found = {}
    for mutant in chosen:
        folder = tmp_path / "mutant"
        shutil.copytree(folders[mutant.base], folder)
        mutant.change(folder)
        try:
            found[str(mutant)] = faults(mutant, folder, sound[mutant.base])
        except Exception as e:
            found[str(mutant)] = [f"{type(e).__name__}: {e}"]
        for path in tmp_path.glob("mutant*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return {name: wrong for name, wrong in found.items() if wrong}


def test_no_mutant_answers_wrongly(folders, sound, tmp_path):
    every = mutants.all_mutants(folders)
    chosen = random.Random(0).sample(every, 320) + [mutant for mutant in every if mutant.name.startswith("fine")]
    assert wrong_ones(chosen, folders, sound, tmp_path) == {}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_no_mutant_of_all_answers_wrongly(folders, sound, tmp_path, seed):
    assert wrong_ones(mutants.all_mutants(folders, seed), folders, sound, tmp_path) == {}
