"""Reads workflows in the frontend's format: what is wrong with one, its API form, what a run made."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

from wantrim.nodes.demo import PROMPT

# live in the frontend only
FRONTEND = {"MarkdownNote", "Note", "Reroute", "PrimitiveNode"}
NOTES = {"MarkdownNote", "Note"}
DYNAMIC = "COMFY_DYNAMICCOMBO_V3"
WIDGET_TYPES = {DYNAMIC, "INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
CONTROLS = {"fixed", "increment", "decrement", "randomize"}
# the frontend adds a control to whole numbers of these names, asked for or not
SEEDS = {"seed", "noise_seed"}
LOADERS = {
    "UNETLoader": "diffusion_models",
    "CLIPLoader": "text_encoders",
    "VAELoader": "vae",
    "CLIPVisionLoader": "clip_vision",
    "LoraLoader": "loras",
    "LoraLoaderModelOnly": "loras",
}
# lists of files that are on the artist's machine
FILES = {
    *((kind, None) for kind in (*LOADERS, "LoadImage")),
    ("WanTrimLoadSlim", "slim_model"),
    ("WanTrimSlim", "diffusion_model"),
}
# takes and gives what is connected to it
ANY = {"*", "COMFY_MATCHTYPE_V3"}
ACTIVE, MUTED, BYPASSED = 0, 2, 4
# of the tiny Wan's videos
PIXEL_FRAMES, SIDE = 17, 96


def graphs(workflow: dict) -> Iterator[tuple[list[dict], list[dict]]]:
    """Nodes and links (as dicts) of the workflow and of every subgraph in it."""
    names = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
    for graph in (workflow, *workflow.get("definitions", {}).get("subgraphs", [])):
        links = [
            dict(zip(names, link, strict=True)) if isinstance(link, list) else link
            for link in graph["links"]
        ]
        yield graph["nodes"], links


def schema_inputs(info: dict, values: dict | None = None) -> dict[str, tuple]:
    """Input name -> (type, options) in the order of the node.

    Args:
        values: of the widgets; a choice among them reveals its inputs, as "choice.input".
    """
    return _inputs(info["input"], values or {}, "")


def _inputs(groups: dict, values: dict, prefix: str) -> dict[str, tuple]:
    found = {}
    for group in ("required", "optional"):
        for name, spec in groups.get(group, {}).items():
            name = prefix + name
            kind = "COMBO" if isinstance(spec[0], list) else spec[0]
            options = dict(spec[1]) if len(spec) > 1 else {}
            if isinstance(spec[0], list):
                options["options"] = spec[0]
            revealed = {}
            if kind == DYNAMIC:
                revealed = {option["key"]: option["inputs"] for option in options["options"]}
                options["options"] = list(revealed)
            found[name] = (kind, options)
            found |= _inputs(revealed.get(values.get(name), {}), values, f"{name}.")
    return found


def is_widget(kind: str, options: dict) -> bool:
    return kind in WIDGET_TYPES and not options.get("forceInput")


def has_control(name: str, kind: str, options: dict) -> bool:
    return kind == "INT" and (bool(options.get("control_after_generate")) or name in SEEDS)


def widget_values(node: dict, info: dict) -> dict[str, object]:
    """Widget name -> value of one node.

    Raises:
        ValueError: there are more or fewer values than widgets.
    """
    schema = schema_inputs(info)
    values = list(node.get("widgets_values") or [])
    found = {}
    for given in node.get("inputs", []):
        if "widget" not in given:
            continue
        name = given["name"]
        if not values:
            raise ValueError(f"{node['type']}: no value for the widget {name!r}")
        found[name] = values.pop(0)
        kind, options = schema.get(name, ("", {}))
        if has_control(name, kind, options):
            control = values.pop(0) if values else None
            if control not in CONTROLS:
                raise ValueError(f"{node['type']}: {name!r} needs a control, got {control!r}")
    if values:
        raise ValueError(f"{node['type']}: {len(values)} widget values too many: {values}")
    return found


def node_problems(node: dict, infos: dict) -> list[str]:
    """What is wrong with one node by itself."""
    kind = node["type"]
    problems = [
        f"{kind}: no properties.{key}"
        for key in ("cnr_id", "ver")
        if not node.get("properties", {}).get(key)
    ]
    if kind in FRONTEND:
        return problems
    if kind not in infos:
        return [*problems, f"{kind}: unknown to ComfyUI and to the pack"]
    try:
        values = widget_values(node, infos[kind])
    except ValueError as error:
        return [*problems, str(error)]
    schema = schema_inputs(infos[kind], values)
    names = [given["name"] for given in node.get("inputs", [])]
    # the frontend has widgets of its own, such as LoadImage's upload
    shown = [name for name in names if name in values and (name in schema or "." in name)]
    if shown != [name for name in schema if is_widget(*schema[name])]:
        problems.append(f"{kind}: the widgets are not those of the node, in its order: {shown}")
    problems += [f"{kind}: input {name!r} is missing" for name in schema if name not in names]
    for name, value in values.items():
        problems += value_problems(kind, name, value, *schema.get(name, ("", {})))
    if kind in LOADERS:
        models = node["properties"].get("models", [])
        for model in models:
            missing = {"name", "url", "directory"} - set(model)
            problems += [f"{kind}: models has no {key}" for key in missing]
            if model.get("directory") != LOADERS[kind]:
                problems.append(
                    f"{kind}: models go to {LOADERS[kind]}, not {model.get('directory')}"
                )
        if {model.get("name") for model in models}.isdisjoint(map(str, values.values())):
            problems.append(f"{kind}: properties.models does not name {values}")
    return problems


def value_problems(node: str, name: str, value, kind: str, options: dict) -> list[str]:
    if kind in ("INT", "FLOAT"):
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            return [f"{node}: {name} is {value!r}, expected a number"]
        low, high = options.get("min", value), options.get("max", value)
        if not low <= value <= high:
            return [f"{node}: {name} is {value}, expected {low} to {high}"]
    # model and image files are those of the artist's machine
    files = kind == "COMBO" and not FILES.isdisjoint({(node, None), (node, name)})
    if kind in ("COMBO", DYNAMIC) and not files and value not in options["options"]:
        return [f"{node}: {name} is {value!r}, expected one of {options['options']}"]
    if kind == "BOOLEAN" and not isinstance(value, bool):
        return [f"{node}: {name} is {value!r}, expected true or false"]
    return []


def fits(output: str, wanted: str) -> bool:
    return not ANY.isdisjoint((output, wanted)) or bool(
        set(output.split(",")) & set(wanted.split(","))
    )


def link_problems(nodes: list[dict], links: list[dict], infos: dict) -> list[str]:
    """Links that lead nowhere, or whose ends do not fit."""
    by_id = {node["id"]: node for node in nodes}
    problems = []
    used = {link["id"]: link for link in links}
    for node in nodes:
        for slot, given in enumerate(node.get("inputs", [])):
            if given.get("link") is None:
                needed = infos.get(node["type"], {}).get("input", {}).get("required", {})
                if given["name"] in needed and "widget" not in given:
                    problems.append(f"{node['type']}: {given['name']!r} is not connected")
                continue
            link = used.get(given["link"])
            if link is None or (link["target_id"], link["target_slot"]) != (node["id"], slot):
                problems.append(
                    f"{node['type']}: {given['name']!r} names a link that is not its own"
                )
    for link in links:
        # ends at the rim of a subgraph have no node
        origin, target = by_id.get(link["origin_id"]), by_id.get(link["target_id"])
        rim = {link["origin_id"], link["target_id"]} & {-10, -20}
        if not rim and (origin is None or target is None):
            problems.append(f"link {link['id']} has an end without a node")
        elif origin and target and not {origin["type"], target["type"]} & FRONTEND:
            output = infos[origin["type"]]["output"][link["origin_slot"]]
            output = "COMBO" if isinstance(output, list) else output
            given = target["inputs"][link["target_slot"]]
            wanted = schema_inputs(infos[target["type"]])[given["name"]][0]
            if not fits(output, wanted) or not fits(output, link["type"]):
                problems.append(
                    f"link {link['id']}: {origin['type']} gives {output}, "
                    f"{target['type']}.{given['name']} takes {wanted}, the link says {link['type']}"
                )
            if link["id"] not in (origin["outputs"][link["origin_slot"]].get("links") or []):
                problems.append(f"link {link['id']} is not among the outputs of {origin['type']}")
    return problems


def problems(workflow: dict, infos: dict) -> list[str]:
    """Everything that is wrong with a workflow."""
    inside = {graph["id"] for graph in workflow.get("definitions", {}).get("subgraphs", [])}
    found = []
    for nodes, links in graphs(workflow):
        for node in nodes:
            if node["type"] not in inside:
                found += node_problems(node, infos)
        known = [node for node in nodes if node["type"] in infos or node["type"] in FRONTEND]
        if len(known) == len(nodes):
            found += link_problems(nodes, links, infos)
    return found


def to_api(workflow: dict, infos: dict) -> dict:
    """The prompt that the frontend would queue, without what is muted.

    Raises:
        ValueError: the workflow has subgraphs or nodes that are bypassed and pass something on.
    """
    (nodes, links), *subgraphs = graphs(workflow)
    if subgraphs or any(map(passes_on, nodes)):
        raise ValueError("subgraphs and bypassed nodes are not converted")
    return _prompt([node for node in nodes if node.get("mode", ACTIVE) == ACTIVE], links, infos, {})


def passes_on(node: dict) -> bool:
    linked = any(given.get("link") is not None for given in node.get("inputs", []))
    return node.get("mode", ACTIVE) == BYPASSED and linked


def inside(subgraph: dict, infos: dict, given: dict) -> tuple[dict, dict]:
    """The prompt of a subgraph's nodes, keys "in.1" and so on, and what its outputs are.

    Args:
        given: input name of the subgraph -> value or link; the others keep the inner widget's.

    Returns:
        The nodes, and output name -> link.
    """
    [(nodes, links)] = graphs(subgraph)
    rim = {k: given[i["name"]] for k, i in enumerate(subgraph["inputs"]) if i["name"] in given}
    prompt = _prompt(nodes, links, infos, rim, "in.")
    outputs = {
        subgraph["outputs"][link["target_slot"]]["name"]: [
            f"in.{link['origin_id']}",
            link["origin_slot"],
        ]
        for link in links
        if link["target_id"] == -20
    }
    return prompt, outputs


def _prompt(nodes: list, links: list, infos: dict, rim: dict[int, object], prefix="") -> dict:
    running = {node["id"] for node in nodes}
    by_link = {link["id"]: link for link in links}
    prompt = {}
    for node in nodes:
        if node["type"] in NOTES:
            continue
        inputs = widget_values(node, infos[node["type"]])
        for given in node.get("inputs", []):
            if given.get("link") is not None:
                link = by_link[given["link"]]
                if link["origin_id"] in running:
                    inputs[given["name"]] = [f"{prefix}{link['origin_id']}", link["origin_slot"]]
                elif link["origin_id"] == -10 and link["origin_slot"] in rim:
                    inputs[given["name"]] = rim[link["origin_slot"]]
        prompt[f"{prefix}{node['id']}"] = {"class_type": node["type"], "inputs": inputs}
    return prompt


def saved(server, entry) -> list[Path]:
    """Files that a run wrote to the output folder."""
    found = []
    for output in entry["outputs"].values():
        for group in ("images", "gifs", "video"):
            for file in output.get(group, []):
                if file["type"] == "output":
                    found.append(server.base / "output" / file["subfolder"] / file["filename"])
    return sorted(found)


def texts(entry) -> str:
    """What the nodes of a run said."""
    return "\n".join(
        "\n".join(map(str, o["text"])) for o in entry["outputs"].values() if "text" in o
    )


def with_inputs(prompt: dict, kind: str, /, **inputs) -> dict:
    """A copy of a prompt in which all nodes of a kind have these inputs."""
    changed = copy.deepcopy(prompt)
    hit = [node for node in changed.values() if node["class_type"] == kind]
    assert hit, kind
    for node in hit:
        assert set(inputs) <= set(node["inputs"])
        node["inputs"].update(inputs)
    return changed


def needed_by(prompt: dict, *keys: str) -> dict:
    """The part of a prompt that these nodes need, with them."""
    pending, needed = list(keys), set()
    while pending:
        key = pending.pop()
        needed.add(key)
        links = [value for value in prompt[key]["inputs"].values() if isinstance(value, list)]
        pending += [link[0] for link in links if link[0] not in needed]
    return {key: node for key, node in prompt.items() if key in needed}


def only_for(prompt: dict, kind: str) -> dict:
    """What the nodes of a kind need of a prompt: the host runs other outputs despite an error."""
    return needed_by(prompt, *(key for key, node in prompt.items() if node["class_type"] == kind))


def only_group(workflow: dict, number: int) -> dict:
    """The workflow with one of its two big groups on and the other off, as an artist sets them."""
    changed = copy.deepcopy(workflow)
    for group in changed["groups"]:
        if group["title"][0] in "12":
            mode = ACTIVE if group["title"].startswith(f"{number} ") else MUTED
            left, top, width, height = group["bounding"]
            for node in changed["nodes"]:
                x, y = node["pos"]
                if left < x < left + width and top < y < top + height:
                    node["mode"] = mode
    return changed


def on_tiny_wan(prompt: dict) -> dict:
    """The prompt small and short, with the tiny Wan's VAE and prompts.

    The loaders of models and LoRAs stay: tiny files of their names are to be in the server's folders.
    """
    changed = copy.deepcopy(prompt)
    small = {"width": SIDE, "height": SIDE, "length": PIXEL_FRAMES}
    changed["tiny"] = {"class_type": "WanTrimDemoModel", "inputs": {}}
    vae = {key: ["tiny", 1] for key, node in prompt.items() if node["class_type"] == "VAELoader"}
    for key, node in prompt.items():
        kind, inputs = node["class_type"], changed[key]["inputs"]
        if kind in ("VAELoader", "CLIPLoader"):
            del changed[key]
        elif kind == "CLIPTextEncode":
            changed[key] = {"class_type": "WanTrimDemoPrompt", "inputs": {"prompt": PROMPT}}
        elif kind in ("EmptyHunyuanLatentVideo", "WanImageToVideo"):
            inputs.update(small)
        elif kind == "Wan22ImageToVideoLatent":
            # of another latent space than the tiny Wan's
            changed[key]["class_type"] = "EmptyHunyuanLatentVideo"
            changed[key]["inputs"] = {**small, "batch_size": inputs["batch_size"]}
        elif kind == "KSampler" and not isinstance(inputs["steps"], list):
            # from the third step on it is known which tokens change most, and at 3 steps only whole
            # and repeated ones meet the dial
            inputs["steps"] = 4
    for node in changed.values():
        for name, value in node["inputs"].items():
            if isinstance(value, list):
                node["inputs"][name] = vae.get(value[0], value)
    return changed
