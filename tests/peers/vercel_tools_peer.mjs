// Vercel's `ai` package and tools that the server at argv[2] runs, through Responses and Messages; prints what it got as JSON.
import { createAnthropic } from '@ai-sdk/anthropic';
import { createOpenAI } from '@ai-sdk/openai';
import { generateText, streamText } from 'ai';

const openai = createOpenAI({ baseURL: process.argv[2] + '/v1', apiKey: 'none' });
const anthropic = createAnthropic({ baseURL: process.argv[2] + '/v1', apiKey: 'none' });
const prompt = '2 + 3?';
const common = { maxOutputTokens: 100, maxRetries: 0 };
const mcp = { serverLabel: 'fake', serverUrl: '', requireApproval: 'never', allowedTools: ['add', 'pick'] };
const toolConfiguration = { enabled: true, allowedTools: ['add', 'pick'] };
const asked = {
  // later turns name the items of this one by their ids (item_reference)
  responses: { ...common, model: openai('default'), tools: { mcp: openai.tools.mcp(mcp) } },
  // nothing is kept: later turns repeat what was said
  unkept: {
    ...common, model: openai('default'), tools: { mcp: openai.tools.mcp(mcp) }, providerOptions: { openai: { store: false } },
  },
  messages: {
    ...common, model: anthropic('default'),
    providerOptions: { anthropic: { mcpServers: [{ type: 'url', name: 'fake', url: '', toolConfiguration }] } },
  },
};

const found = {};
for (const [api, question] of Object.entries(asked)) {
  const whole = await generateText({ ...question, prompt });
  const stream = streamText({ ...question, prompt });
  const kinds = [];
  let streamed = '';
  for await (const part of stream.fullStream) {
    if (part.type === 'error') throw part.error;
    if (part.type === 'text-delta') streamed += part.text;
    if (part.type === 'tool-call' || part.type === 'tool-result') kinds.push(part.type);
  }
  // the next turn has the call and its result
  const messages = [{ role: 'user', content: prompt }, ...whole.response.messages, { role: 'user', content: 'Thanks.' }];
  const later = await generateText({ ...question, messages });
  const kept = whole.content.filter((part) => part.type.startsWith('tool-'));
  found[api] = {
    text: whole.text, streamed, kinds, later: later.text, finish: whole.finishReason, usage: whole.usage.outputTokens,
    call: kept.find((part) => part.type === 'tool-call').input, result: kept.find((part) => part.type === 'tool-result').output,
  };
}

// a call of which a person must approve, by default in two requests
const asking = { ...common, model: openai('default'), tools: { mcp: openai.tools.mcp({ ...mcp, requireApproval: 'always' }) } };
const first = await generateText({ ...asking, prompt });
const request = first.content.find((part) => part.type === 'tool-approval-request');
const yes = { role: 'tool', content: [{ type: 'tool-approval-response', approvalId: request.approvalId, approved: true, providerExecuted: true }] };
const approved = await generateText({ ...asking, messages: [{ role: 'user', content: prompt }, ...first.response.messages, yes] });
found.approved = { input: request.toolCall.input, text: approved.text, kinds: approved.content.map((part) => part.type) };
console.log(JSON.stringify(found));
