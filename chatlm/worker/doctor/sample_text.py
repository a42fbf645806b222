"""The text on which a model is compared with its original: prose, a dialogue, code, numbers."""

TEXT = '''\
The lighthouse at the end of the pier had been dark for eleven years when the town decided to repair
it. Nobody expected the work to take long. The lamp itself was sound, the stairs were sound, and the
keeper's room still had its table and its two chairs. What had failed was the clockwork that turned
the lens, and the only person who understood clockwork of that age was a retired teacher who lived
above the bakery. She came every morning with a thermos of tea, took one wheel out, cleaned it,
measured it, and wrote the measurements into a notebook. By the end of the second week the notebook
was full, and the wheels lay on the table in the order in which they would go back. "It is not
broken," she said to the mayor. "It is only tired, and somebody oiled it with the wrong oil."

The history of measuring time is a history of finding things that repeat. The sun repeats every day,
the moon every month, and the stars return to the same place after a year. A pendulum repeats about
once a second if it is one metre long, which Galileo noticed and Huygens used. A quartz crystal in a
watch vibrates 32,768 times a second, because that number is a power of two and can be halved again
and again by a simple circuit until one pulse a second remains. Atomic clocks count the vibrations
of caesium: 9,192,631,770 of them are one second by definition.

User: I have to be in Lyon on Friday at nine in the morning, and I live in Geneva. Should I take the
train?
Assistant: The first direct train usually takes a little under two hours, so it would bring you
there in time if it leaves before seven. Please check the timetable for Friday, since there are
fewer trains on public holidays. Do you need to return on the same day?
User: Yes, in the evening, not before six.
Assistant: Then a return ticket for the same day is probably the cheapest choice. There are several
trains after six, and the last one leaves at about eight.

def moving_average(values, size):
    """The mean of each run of `size` values."""
    if size < 1:
        raise ValueError("size must be at least 1")
    total, means = sum(values[:size]), []
    for index in range(size, len(values) + 1):
        means.append(total / size)
        if index < len(values):
            total += values[index] - values[index - size]
    return means

for (let i = 0; i < rows.length; i++) {
  const cells = rows[i].split(",").map((cell) => cell.trim());
  if (cells.length !== header.length) {
    throw new Error(`row ${i + 1} has ${cells.length} cells, not ${header.length}`);
  }
}

| city | inhabitants | founded |
|---|---|---|
| Bern | 134,000 | 1191 |
| Lausanne | 140,000 | 4th century |

La traduction de cette phrase est simple : le chat dort sur la chaise. Die Katze schläft auf dem
Stuhl. Water boils at 100 degrees Celsius at sea level, and at about 93 degrees at an altitude of
two thousand metres, so that potatoes take longer to cook in the mountains. To solve 3x + 7 = 25,
subtract 7 from both sides, which gives 3x = 18, and divide by 3: x = 6.
'''
