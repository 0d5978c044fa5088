// what a run did so far, and how it is drawn: blocks down, steps across

const SKIPPED = [30, 33, 41]
const LEAST = [44, 74, 62]
const WHOLE = [116, 214, 146]
const PATTERNED = "rgb(98, 150, 232)"
const AHEAD = "rgba(128, 134, 148, 0.18)"

// the server says the line in English; `line` says it in another language, from the same numbers
const WORDS = {
  en: {
    step: (at, of) => `step ${at} of ${of}`,
    stopped: (at, of) => (at ? `stopped in step ${at} of ${of}` : "stopped before its first step"),
    untouched: "untouched: nothing was left out",
    remarks: (count) => `${count} ${count === 1 ? "remark" : "remarks"} in WanTrim Report`,
    key: ["all", "a part", "nothing", "heads in patterns"],
    legend: "What each block (down) computed in each step (across)",
  },
  zh: {
    step: (at, of) => `第 ${at} 步，共 ${of} 步`,
    stopped: (at, of) => (at ? `停在第 ${at} 步，共 ${of} 步` : "在第一步之前停止"),
    untouched: "未改动：什么都没有省去",
    remarks: (count) => `${count} 条说明，见 WanTrim 报告`,
    key: ["全部", "一部分", "无", "头按模式"],
    legend: "每个块（向下）在每一步（向右）计算了什么",
    line: (o) => {
      const part = (of) => `${of[1]} 分之 ${of[0]}`
      const one = o.calls ? "次" : "步"
      const steps = counts(o, {
        whole: `${one}完整`,
        part: `${one}算 ${range(o, part, "到")}`,
        patterned: `${one}的头按模式`,
        repeated: `${one}重复`,
        answered: `${one}由其他节点给出`,
      })
      const gains = [
        o.less > 1.05 && `工作量为原来的 ${Math.round(100 / o.less)}%`,
        o.asked && `要求的是 ${o.asked} 倍`,
        o.starved && "不足以成为视频",
        o.faster && `这里的速度为 ${Number(o.faster.toPrecision(2))} 倍`,
      ]
      return `${o.steps} ${o.calls ? "次模型调用" : "步"}中 ${steps.join("、")}` + tail(gains, "：", "，")
    },
  },
  ja: {
    step: (at, of) => `ステップ ${at}/${of}`,
    stopped: (at, of) => (at ? `ステップ ${at}/${of} で停止` : "最初のステップの前に停止"),
    untouched: "変更なし：何も省かれていません",
    remarks: (count) => `注記 ${count} 件は WanTrim レポートに`,
    key: ["すべて", "一部", "なし", "ヘッドはパターンで"],
    legend: "各ブロック（下へ）が各ステップ（右へ）で計算したもの",
    line: (o) => {
      const part = (of) => `${of[1]} 分の ${of[0]}`
      const steps = counts(o, {
        whole: "は完全",
        part: `は ${range(o, part, "から")}`,
        patterned: "はヘッドがパターンで",
        repeated: "は繰り返し",
        answered: "はほかのノードが回答",
      })
      const gains = [
        o.less > 1.05 && `計算量は元の ${Math.round(100 / o.less)}%`,
        o.asked && `指定は ${o.asked} 倍`,
        o.starved && "動画には少なすぎます",
        o.faster && `ここでの速さは ${Number(o.faster.toPrecision(2))} 倍`,
      ]
      return `${o.steps} ${o.calls ? "回のモデル呼び出し" : "ステップ"}のうち ${steps.join("、")}` + tail(gains, "：", "、")
    },
  },
}

function counts(outcome, names) {
  const there = Object.entries(names).filter(([kind]) => outcome[kind])
  return there.map(([kind, name]) => `${outcome[kind]} ${name}`)
}

function range({ least, most }, say, to) {
  if (!least) return ""
  return String(least) === String(most) ? say(least) : `${say(least)}${to}${say(most)}`
}

function tail(said, colon, comma) {
  const there = said.filter(Boolean)
  return there.length ? colon + there.join(comma) : ""
}

export function words(locale) {
  return WORDS[locale?.split("-")[0]] ?? WORDS.en
}

// the runs of one prompt at one node, in the order in which they came
export class RunMap {
  constructor(prompt, id, workflow) {
    this.prompt = prompt
    this.id = id
    this.workflow = workflow
    this.columns = []
    this.run = null
  }

  // takes in one event of the server
  add(event) {
    if (event.run !== this.run) {
      this.run = event.run
      this.first = this.columns.length
      this.done = false
      this.at = 0
      this.line = ""
      this.outcome = null
    }
    this.steps = event.steps
    if (event.line) {
      this.line = event.line
      this.outcome = event.outcome
    }
    if (event.done) {
      this.done = true
      this.finished = event.finished
      this.remarks = event.remarks
      this.untouched = event.untouched
      return
    }
    this.at = event.step
    const { kept, patterned, work } = event
    this.columns.push({ kept, work, patterned: new Set(patterned) })
  }

  // columns that are filled and those that are still to come
  get width() {
    const ahead = this.done ? 0 : Math.max(this.steps - this.at, 0)
    return this.columns.length + ahead
  }

  // colours that a key has to explain, with their places in its words
  get key() {
    const colours = [shade(100), shade(50), shade(0)].map((colour, place) => [place, colour])
    const patterned = this.columns.some((column) => column.patterned.size)
    return patterned ? [...colours, [3, PATTERNED]] : colours
  }

  text(say) {
    const parts = []
    if (!this.done) parts.push(say.step(this.at, this.steps))
    else if (!this.finished) parts.push(say.stopped(this.at, this.steps))
    if (this.done && this.untouched) parts.push(say.untouched)
    if (this.line) parts.push(say.line ? say.line(this.outcome) : this.line)
    if (this.done && this.remarks) parts.push(say.remarks(this.remarks))
    return parts.join(" · ")
  }

  // into a rectangle of a 2d context
  draw(context, left, top, width, height) {
    const slot = width / Math.max(this.width, 1)
    context.fillStyle = AHEAD
    context.fillRect(left, top, width, height)
    this.columns.forEach((column, index) => {
      const gap = slot > 4 ? 1 : 0
      // the second expert of Wan 2.2, or a second sampler, begins after a wider gap
      const apart = index && index === this.first ? 3 : 0
      const x = left + index * slot + apart
      const wide = Math.max(slot - gap - apart, 1)
      const tall = height / column.kept.length
      column.kept.forEach((kept, block) => {
        const y = top + block * tall
        context.fillStyle = shade(kept)
        context.fillRect(x, y, wide, Math.max(tall - (tall > 3 ? 0.5 : 0), 0.5))
        if (kept && column.patterned.has(block)) {
          context.fillStyle = PATTERNED
          context.fillRect(x, y, Math.min(2, wide / 3), Math.max(tall - 0.5, 0.5))
        }
      })
    })
  }

  // one bar for every step, for a node that is folded up
  strip(context, left, top, width, height) {
    if (!this.columns.length) return
    const slot = width / Math.max(this.width, 1)
    context.fillStyle = AHEAD
    context.fillRect(left, top, width, height)
    this.columns.forEach((column, index) => {
      context.fillStyle = shade(100 * column.work)
      context.fillRect(left + index * slot, top, Math.max(slot - (slot > 4 ? 1 : 0), 1), height)
    })
  }
}

// percent of the tokens -> colour
export function shade(kept) {
  if (!kept) return `rgb(${SKIPPED.join(", ")})`
  const part = Math.min(kept / 100, 1)
  return `rgb(${LEAST.map((low, i) => Math.round(low + part * (WHOLE[i] - low))).join(", ")})`
}
