// Vercel's `ai` package with its openai-compatible provider against the server at argv[2]; prints what it got as JSON.
import { createOpenAICompatible } from '@ai-sdk/openai-compatible';
import { createOpenAI } from '@ai-sdk/openai';
import { generateText, Output, streamText } from 'ai';
import { z } from 'zod';

const server = createOpenAICompatible({
  name: 'here', baseURL: process.argv[2] + '/v1', apiKey: 'none', includeUsage: true, supportsStructuredOutputs: true,
});
const prompt = 'What is the capital of Japan?';
const common = { model: server('default'), temperature: 0, maxOutputTokens: 40, maxRetries: 0 };

const whole = await generateText({ ...common, prompt, seed: 1 });
const stream = streamText({ ...common, messages: [{ role: 'system', content: 'Be brief.' }, { role: 'user', content: prompt }] });
let streamed = '';
for await (const piece of stream.textStream) streamed += piece;
const shaped = await generateText({
  ...common, prompt: 'Tokyo as JSON, please.',
  output: Output.object({ schema: z.object({ city: z.enum(['Tokyo', 'Kyoto']), big: z.boolean() }) }),
});
const completion = await generateText({ ...common, model: server.completionModel('default'), prompt: 'The capital of Japan is', maxOutputTokens: 1 });
let refusal = null;
try {
  await generateText({ ...common, prompt, tools: { f: { description: 'f', inputSchema: z.object({}) } } });
} catch (error) {
  refusal = error.statusCode;
}
const responses = { model: createOpenAI({ baseURL: process.argv[2] + '/v1', apiKey: 'none' })('default'), temperature: 0, maxOutputTokens: 40, maxRetries: 0 };
const answered = await generateText({ ...responses, prompt });
let responsesStreamed = '';
for await (const piece of streamText({ ...responses, prompt }).textStream) responsesStreamed += piece;
console.log(JSON.stringify({
  responses: answered.text, responses_streamed: responsesStreamed,
  text: whole.text, finish_reason: whole.finishReason, usage: whole.usage.outputTokens,
  streamed, streamed_finish: await stream.finishReason, streamed_usage: (await stream.usage).outputTokens,
  shaped: shaped.output, completion: completion.text, tools: refusal,
}));
