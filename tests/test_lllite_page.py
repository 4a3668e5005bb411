"""docs/lllite.md's commands, run one after the other on the tiny model: images, outlines, training, drawing."""

import shlex
from pathlib import Path

from PIL import Image
from test_docs import blocks_of

PAGE = Path(__file__).resolve().parent.parent / "docs" / "lllite.md"
SMALL = {  # what a tiny model and a test have instead
    "sdxl_gen_img.py": "--images_per_prompt 1 --W 64 --H 64 --steps 2",
    "sdxl_train_control_net_lllite.py": (
        "--resolution 64 --min_bucket_reso 32 --max_bucket_reso 128 --bucket_reso_steps 32 --mixed_precision no --max_train_steps 2 --cond_emb_dim 4"
        " --network_dim 4 --max_data_loader_n_workers 0"
    ),
}


def test_the_page_from_prompts_to_controlled_images(golden_model, tmp_path, monkeypatch):
    import sdxl_gen_img
    import sdxl_train_control_net_lllite

    scripts = {
        "sdxl_gen_img.py": sdxl_gen_img,
        "sdxl_train_control_net_lllite.py": sdxl_train_control_net_lllite,
    }
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sd_xl_base_1.0.safetensors").symlink_to(golden_model)
    names = {"txt": "prompts.txt", "toml": "run.toml"}
    for block in blocks_of(PAGE):
        if block.language in names:
            Path(names[block.language]).write_text(block.text, encoding="utf-8")
        elif block.language == "python":
            exec(compile(block.text, str(PAGE), "exec"), {})
        else:
            words = [word for word in shlex.split(block.text) if word != "--bf16"]
            start = next(i for i, word in enumerate(words) if word in scripts)
            scripts[words[start]].main([*words[start + 1 :], *SMALL[words[start]].split()])
    assert sorted(path.name for path in Path("conditions").iterdir()) == [
        "im_000001.png",
        "im_000002.png",
    ]
    captions = [
        Path(f"pictures/1_drawn/im_00000{i}.txt").read_text(encoding="utf-8") for i in (1, 2)
    ]
    assert captions == ["a red house by a lake", "a cat on a sofa"]
    assert Path("output/outlines.safetensors").is_file()
    drawn = list(Path("drawn").glob("*.png"))
    assert len(drawn) == 1
    with Image.open(drawn[0]) as image:
        assert image.size == (64, 64)
