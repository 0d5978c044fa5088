// what a run did so far, and how it is drawn: blocks down, steps across

const SKIPPED = [30, 33, 41]
const LEAST = [44, 74, 62]
const WHOLE = [116, 214, 146]
const PATTERNED = "rgb(98, 150, 232)"
const AHEAD = "rgba(128, 134, 148, 0.18)"

const WORDS = {
  en: {
    step: (at, of) => `step ${at}/${of}`,
    done: (count) => `${count} ${count === 1 ? "step" : "steps"}`,
    stopped: (count) => `stopped after ${count} ${count === 1 ? "step" : "steps"}`,
    work: (share) => `work ${share} %`,
    tokens: (share) => `token work ${share} %`,
    seconds: (each, whole) => `${each} s/step` + (whole ? ` (whole: ${whole} s)` : ""),
    remarks: (count) => `${count} ${count === 1 ? "remark" : "remarks"}: see WanTrim Report`,
    legend:
      "Blocks from top to bottom, steps from left to right. Bright: on all tokens; darker: on a " +
      "part of them; black: not run (all of a step: it repeats an earlier one); blue edge: heads in " +
      "their patterns.",
  },
  zh: {
    step: (at, of) => `第 ${at}/${of} 步`,
    done: (count) => `${count} 步`,
    stopped: (count) => `${count} 步后停止`,
    work: (share) => `工作量 ${share} %`,
    tokens: (share) => `令牌工作量 ${share} %`,
    seconds: (each, whole) => `每步 ${each} 秒` + (whole ? `（完整步 ${whole} 秒）` : ""),
    remarks: (count) => `${count} 条说明，见 WanTrim 报告`,
    legend: "从上到下是块，从左到右是步。亮：全部令牌；较暗：部分令牌；黑：未运行（整列：该步重复之前的结果）；蓝边：按注意力头的模式运行。",
  },
}

export function words(locale) {
  return WORDS[locale?.split("-")[0]] ?? WORDS.en
}

// the runs of one prompt at one node, in the order in which they came
export class RunMap {
  constructor(prompt) {
    this.prompt = prompt
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
    }
    this.steps = event.steps
    if (event.done) {
      this.done = true
      this.finished = event.finished
      this.remarks = event.remarks
      return
    }
    this.at = event.step
    const { kept, patterned, repeated, work, tokens, whole, seconds } = event
    const column = { kept, repeated, work, tokens, whole, seconds }
    this.columns.push({ ...column, patterned: new Set(patterned) })
  }

  // of the run that goes on
  get current() {
    return this.columns.slice(this.first)
  }

  // columns that are filled and those that are still to come
  get width() {
    const ahead = this.done ? 0 : Math.max(this.steps - this.at, 0)
    return this.columns.length + ahead
  }

  text(say) {
    const ran = this.current
    if (!ran.length) return this.done ? say.done(0) : ""
    const known = ran.every((column) => column.work !== null)
    const share = Math.round(100 * mean(ran.map((c) => (known ? c.work : c.tokens))))
    // a step that repeats another takes no time worth a mean
    const trimmed = ran.filter((column) => !column.whole && !column.repeated)
    const whole = ran.filter((column) => column.whole)
    const shown = trimmed.length ? trimmed : whole
    const reference = trimmed.length && whole.length ? seconds(whole) : null
    let head = say.step(this.at, this.steps)
    if (this.done) head = this.finished ? say.done(ran.length) : say.stopped(ran.length)
    const parts = [head, known ? say.work(share) : say.tokens(share)]
    parts.push(say.seconds(seconds(shown), reference))
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
    const slot = width / Math.max(this.width, 1)
    context.fillStyle = AHEAD
    context.fillRect(left, top, width, height)
    this.columns.forEach((column, index) => {
      context.fillStyle = shade(Math.max(100 * (column.work ?? column.tokens), 1))
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

function mean(values) {
  return values.reduce((sum, value) => sum + value, 0) / values.length
}

function seconds(columns) {
  const sorted = columns.map((column) => column.seconds).sort((a, b) => a - b)
  const middle = sorted.length >> 1
  const value = sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2
  return value < 9.95 ? value.toFixed(2) : value.toFixed(1)
}
