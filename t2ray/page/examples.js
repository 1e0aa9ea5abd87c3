// Questions to begin with, of the kinds that the served model and its experts answer.

const TINY = ["17+25", "add 3 to n", "larger? A 17 B 42", "hello Anna, how are you?"]; // all that it knows

const VISION = ["which shape is red?", "how many circles are there?", "where is the blue shape?"]; // with a picture

const KINDS = [
  [/math|gsm|arith|aime/, "Anna has 3 boxes of 12 pencils and gives 7 pencils away. How many are left?"],
  [/code|mbpp|python|humaneval/, "Write a Python function that returns the longest word of a text."],
  [/arc|pick|choice|science|mmlu/, "Which of these conducts electricity best? A. wood B. copper C. glass D. rubber"],
  [/stor|tale|write|poem/, "Once upon a time there was a small boat"],
];

const ANY = ["What can you help me with?", "Write two sentences about the sea.", "What is 17 + 25?"];

/** Up to four questions for the base model of that name and the experts of that list. */
export function examples(base, experts) {
  if (base === "tiny") return TINY;
  if (base === "tiny-vision") return VISION;
  const words = [base, ...experts.flatMap(({ name, domain }) => [name, domain])].join(" ").toLowerCase();
  const fitting = KINDS.filter(([kind]) => kind.test(words)).map(([, text]) => text);
  return [...fitting, ...ANY].slice(0, 4);
}
