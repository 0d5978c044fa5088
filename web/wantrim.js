// draws on WanTrim's nodes what each step of the sampling run computed, as it happens
// import maps are not to be had: these two are served by ComfyUI
import { api } from "../../scripts/api.js"
import { app } from "../../scripts/app.js"

import { RunMap, words } from "./live_map.js"

const EVENT = "wantrim.step"
const WIDGET = "wantrim_live"
const MAP_HEIGHT = 72
// the classic canvas leaves this much around a widget on both sides together
const MARGINS = 20
// and Nodes 2.0 between two
const GAP = 4
// modes of a node that does not run: never, and bypassed
const OFF = [2, 4]

// workflow and node id as ComfyUI runs it ("3", or "7:3" inside of subgraph node 7) -> its map
const maps = new Map()

// the node of an id behind the subgraph nodes around it; empty when another workflow is open
function path({ id, workflow }) {
  let graph = app.rootGraph ?? app.graph
  // a prompt that no page made, or an older page, has none
  if (workflow && graph?.id && workflow !== graph.id) return []
  const found = []
  for (const part of String(id).split(":")) {
    const node = graph?.getNodeById(part)
    if (!node) return []
    found.push(node)
    graph = node.subgraph
  }
  const node = found.at(-1)
  return (node.comfyClass ?? node.type)?.startsWith("WanTrim") ? found : []
}

function say() {
  return words(app.extensionManager?.setting?.get("Comfy.Locale") ?? "en")
}

function element() {
  const root = document.createElement("div")
  root.className = "wantrim-live"
  root.setAttribute("role", "img")
  // clicks and the wheel are the graph's
  root.style.cssText = `width:100%;pointer-events:none;font:11px/1.3 sans-serif;
    color:var(--input-text,#ddd)`
  const canvas = document.createElement("canvas")
  canvas.style.cssText = `display:block;width:100%;height:${MAP_HEIGHT}px;border-radius:4px`
  const key = document.createElement("div")
  key.style.cssText = "display:flex;flex-wrap:wrap;gap:0 10px;padding-top:3px;opacity:0.75"
  const line = document.createElement("div")
  line.style.cssText = "padding-top:2px"
  // its height is that of what it holds, however high the widget is
  const inner = document.createElement("div")
  inner.append(canvas, key, line)
  root.append(inner)
  return { root, inner, canvas, key, line }
}

function swatch(colour, name) {
  const item = document.createElement("span")
  const square = document.createElement("span")
  square.style.cssText = `display:inline-block;width:9px;height:9px;margin-right:4px;
    box-sizing:border-box;border:1px solid rgba(128,134,148,0.6);background:${colour}`
  item.append(square, name)
  return item
}

function paint(node) {
  const { map, parts } = node.wantrimLive
  const { root, inner, canvas, key, line } = parts
  const text = say()
  line.textContent = map.text(text)
  // of a run without a step there is no map
  canvas.style.display = map.columns.length ? "block" : "none"
  key.style.display = map.columns.length ? "flex" : "none"
  key.replaceChildren(...map.key.map(([place, colour]) => swatch(colour, text.key[place])))
  root.setAttribute("aria-label", `WanTrim: ${line.textContent}. ${text.legend}.`)
  // of the page's pixels: zooming in must not blur it
  const scale = 2 * (window.devicePixelRatio || 1)
  const width = canvas.clientWidth || Math.max(node.size[0] - 30, 50)
  canvas.width = Math.round(width * scale)
  canvas.height = Math.round(MAP_HEIGHT * scale)
  const context = canvas.getContext("2d")
  context.scale(scale, scale)
  map.draw(context, 0, 0, width, MAP_HEIGHT)
  fit(node, inner.offsetHeight)
}

// as high as what it says, so that nothing is cut
function fit(node, tall) {
  const live = node.wantrimLive
  if (tall <= live.tall) return
  live.tall = tall
  const before = node.size[1]
  node.setSize([node.size[0], Math.max(before, node.computeSize()[1])])
  if (node.size[1] > before) live.size = node.size[1]
}

// gives a node its map; nothing of it goes into the workflow
function equip(node) {
  const parts = element()
  const live = (node.wantrimLive = { parts, before: node.size[1], size: 0, tall: 0 })
  const height = () => live.tall + MARGINS
  live.widget = node.addDOMWidget(WIDGET, WIDGET, parts.root, {
    serialize: false,
    hideOnZoom: false,
    // one element cannot be in two places: the panel would take it away from the node
    hideInPanel: true,
    getMinHeight: height,
    getMaxHeight: height,
  })
  // the option is for the prompt, the field for the workflow
  live.widget.serialize = false
  live.resized = new ResizeObserver(() => node.wantrimLive === live && paint(node))
  live.resized.observe(parts.canvas)
  live.resized.observe(parts.inner)
  if (!node.wantrimHooked) hook(node)
}

function hook(node) {
  node.wantrimHooked = true
  const { onSerialize, onRemoved } = node
  node.onSerialize = function (data) {
    const result = onSerialize?.apply(this, arguments)
    const live = this.wantrimLive
    if (live && data.size) data.size = [data.size[0], without(live, data.size[1])]
    return result
  }
  node.onRemoved = function () {
    this.wantrimLive?.resized.disconnect()
    return onRemoved?.apply(this, arguments)
  }
}

// the height of a node without its map
function without(live, height) {
  if (!live.size) return height
  const laid = LiteGraph.vueNodesMode ? live.before + live.parts.inner.offsetHeight + GAP : 0
  const by = height - Math.max(live.size, laid)
  // what is more is the user's, but for what a browser rounds
  return live.before + (by > 1 ? by : 0)
}

function clear(node) {
  const live = node.wantrimLive
  if (!live) return
  live.resized.disconnect()
  const height = without(live, node.size[1])
  node.wantrimLive = undefined
  node.removeWidget(live.widget)
  node.setSize([node.size[0], height])
  node.setDirtyCanvas?.(true, true)
}

function show(node, map) {
  if (!node.wantrimLive) {
    equip(node)
    // what a map takes at the least, before the page has laid it out
    if (map.columns.length) fit(node, MAP_HEIGHT + 34)
  }
  node.wantrimLive.map = map
  paint(node)
  node.setDirtyCanvas?.(true, true)
}

function take(event) {
  for (const id of event.nodes) {
    const key = `${event.workflow} ${id}`
    let map = maps.get(key)
    // several runs of one prompt stand side by side, a new prompt begins anew
    if (map?.prompt !== event.prompt) {
      maps.set(key, (map = new RunMap(event.prompt, id, event.workflow)))
    }
    map.add(event)
    for (const node of path(map)) show(node, map)
  }
}

// what a node that does not run shows is of an earlier run
function forget() {
  for (const [key, map] of maps) {
    const nodes = path(map)
    if (nodes.some((node) => OFF.includes(node.mode))) {
      maps.delete(key)
      nodes.forEach(clear)
    }
  }
}

// beneath a folded node, as wide as it is when it is open
function underFolded(context, node) {
  const { map } = node.wantrimLive
  const [left, top] = node.pos
  const width = node.size[0]
  context.font = "11px sans-serif"
  context.textAlign = "left"
  const lines = [""]
  for (const word of map.text(say()).split(" ")) {
    const longer = `${lines.at(-1)} ${word}`.trim()
    if (context.measureText(longer).width > width - 12) lines.push(word)
    else lines[lines.length - 1] = longer
  }
  context.fillStyle = "rgba(20, 22, 27, 0.85)"
  context.fillRect(left, top + 4, width, 15 * lines.length + 16)
  map.strip(context, left + 6, top + 9, width - 12, 4)
  context.fillStyle = "#ddd"
  lines.forEach((line, row) => context.fillText(line, left + 6, top + 27 + 15 * row))
}

app.registerExtension({
  name: "WanTrim.Live",
  // undo, and a change of workflow, make all nodes anew
  afterConfigureGraph() {
    for (const map of maps.values()) {
      if (map.workflow) for (const node of path(map)) show(node, map)
    }
  },
  setup() {
    api.addEventListener(EVENT, ({ detail }) => take(detail))
    const { onDrawForeground } = app.canvas
    // of the canvas, which is drawn in Nodes 2.0 too
    app.canvas.onDrawForeground = function (context) {
      onDrawForeground?.apply(this, arguments)
      forget()
      for (const node of this.graph?.nodes ?? []) {
        if (node.wantrimLive && node.flags?.collapsed) underFolded(context, node)
      }
    }
  },
})
