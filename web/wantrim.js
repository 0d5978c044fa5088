// draws on WanTrim's nodes what each step of the sampling run computed, as it happens
// import maps are not to be had: these two are served by ComfyUI
import { api } from "../../scripts/api.js"
import { app } from "../../scripts/app.js"

import { RunMap, words } from "./live_map.js"

const EVENT = "wantrim.step"
const WIDGET = "wantrim_live"
const MAP_HEIGHT = 72
const HEIGHT = MAP_HEIGHT + 44
// Nodes 2.0 has margins of its own around a widget
const MARGINS = 32

// node id as ComfyUI runs it ("3", or "7:3" inside of subgraph node 7) -> its map
const maps = new Map()

// the node of an id, or undefined when another workflow is open
function find(id) {
  let graph = app.rootGraph ?? app.graph
  let node
  for (const part of String(id).split(":")) {
    node = graph?.getNodeById(part)
    graph = node?.subgraph
  }
  return (node?.comfyClass ?? node?.type)?.startsWith("WanTrim") ? node : undefined
}

function locale() {
  return app.extensionManager?.setting?.get("Comfy.Locale") ?? "en"
}

function element() {
  const root = document.createElement("div")
  root.className = "wantrim-live"
  root.setAttribute("role", "img")
  // clicks and the wheel are the graph's
  root.style.cssText = `display:flex;flex-direction:column;gap:4px;width:100%;height:100%;
    min-height:${HEIGHT - 20}px;box-sizing:border-box;pointer-events:none`
  const canvas = document.createElement("canvas")
  canvas.style.cssText = `display:block;width:100%;height:${MAP_HEIGHT}px;border-radius:4px`
  const line = document.createElement("div")
  line.style.cssText = `font:11px sans-serif;line-height:1.2;color:var(--input-text,#ddd);
    overflow:hidden;white-space:normal`
  root.append(canvas, line)
  return { root, canvas, line }
}

function paint(node) {
  const { map, parts } = node.wantrimLive
  const { root, canvas, line } = parts
  const say = words(locale())
  line.textContent = map.text(say)
  root.setAttribute("aria-label", `WanTrim: ${line.textContent}. ${say.legend}`)
  // of the page's pixels: zooming in must not blur it
  const scale = 2 * (window.devicePixelRatio || 1)
  const width = canvas.clientWidth || Math.max(node.size[0] - 30, 50)
  canvas.width = Math.round(width * scale)
  canvas.height = Math.round(MAP_HEIGHT * scale)
  const context = canvas.getContext("2d")
  context.scale(scale, scale)
  map.draw(context, 0, 0, width, MAP_HEIGHT)
}

// gives a node its map once; nothing of it goes into the workflow
function equip(node) {
  const parts = element()
  const before = node.size[1]
  const widget = node.addDOMWidget(WIDGET, WIDGET, parts.root, {
    serialize: false,
    hideOnZoom: false,
    getMinHeight: () => HEIGHT,
    getMaxHeight: () => HEIGHT,
  })
  // the option is for the prompt, the field for the workflow
  widget.serialize = false
  node.setSize([node.size[0], Math.max(before, node.computeSize()[1])])
  const grown = Math.max(node.size[1] - before, 0)
  const onSerialize = node.onSerialize
  node.onSerialize = function (data) {
    const result = onSerialize?.apply(this, arguments)
    const added = grown && grown + (LiteGraph.vueNodesMode ? MARGINS : 0)
    if (data.size && added) data.size = [data.size[0], Math.max(before, data.size[1] - added)]
    return result
  }
  const onDrawForeground = node.onDrawForeground
  node.onDrawForeground = function (context) {
    const result = onDrawForeground?.apply(this, arguments)
    if (this.flags?.collapsed) {
      const width = this._collapsed_width || this.size[0]
      this.wantrimLive.map.strip(context, 8, -5, width - 16, 3)
    }
    return result
  }
  const resized = new ResizeObserver(() => paint(node))
  resized.observe(parts.canvas)
  const onRemoved = node.onRemoved
  node.onRemoved = function () {
    resized.disconnect()
    return onRemoved?.apply(this, arguments)
  }
  node.wantrimLive = { parts }
}

function show(node, map) {
  if (!node.wantrimLive) equip(node)
  node.wantrimLive.map = map
  paint(node)
  node.setDirtyCanvas?.(true, true)
}

function take(event) {
  for (const id of event.nodes) {
    let map = maps.get(id)
    // several runs of one prompt stand side by side, a new prompt begins anew
    if (map?.prompt !== event.prompt) maps.set(id, (map = new RunMap(event.prompt)))
    map.add(event)
    const node = find(id)
    if (node) show(node, map)
  }
}

app.registerExtension({
  name: "WanTrim.Live",
  setup() {
    api.addEventListener(EVENT, ({ detail }) => take(detail))
  },
})
