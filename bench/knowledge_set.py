"""Forty documents and three hundred questions for bench/knowledge_quality.py. They were written for it, and are in the public domain (CC0 1.0).

Eight kinds of document, five of each. The five of a kind have the same sections and different facts: as in the manuals of one maker, what a
passage is about is said by its document, its heading, or a word in passing, and every passage has four near twins. A question asks for one
fact, in words that are mostly not those of the passage; it names the subject of the document. Each fact has two phrasings, which the five
documents of a kind use in turn. So this set asks whether a search tells twins apart and understands other words. It does not ask about
typing errors, other languages, questions over several passages, or long documents.

`documents()` gives (file name, text in Markdown); `questions()` gives `Question`s, and `lookups()` forty more, which name the fact itself. The sentence that answers one is found by its text."""

import random
from typing import NamedTuple


class Kind(NamedTuple):
    name: str
    fields: tuple       # names of the facts
    subjects: tuple     # a tuple of values for each document, the first is its subject
    sections: tuple     # (heading, sentences)
    asked: tuple        # (section, sentence, phrasings)


class Question(NamedTuple):
    text: str
    file: str
    answer: str         # the sentence of the document that has the answer


KINDS = (
    Kind("pump manual", ("name", "flow", "rise", "seal", "oil", "weight", "hours", "noise", "cold"), (
        ("Kestrel 40", "38 cubic metres an hour", "21 metres", "silicon carbide", "1.8 litres", "64 kg", "2,000", "71 decibels", "minus 12 degrees"),
        ("Kestrel 65", "61 cubic metres an hour", "34 metres", "tungsten carbide", "2.4 litres", "97 kg", "2,500", "76 decibels", "minus 8 degrees"),
        ("Heron 12", "11 cubic metres an hour", "48 metres", "carbon graphite", "0.6 litres", "29 kg", "1,200", "63 decibels", "minus 20 degrees"),
        ("Osprey 200", "195 cubic metres an hour", "16 metres", "ceramic alumina", "5.1 litres", "310 kg", "4,000", "83 decibels", "4 degrees"),
        ("Dipper 5", "4.7 cubic metres an hour", "9 metres", "nitrile rubber", "no oil at all", "8 kg", "600", "52 decibels", "minus 2 degrees")), (
        ("Purpose", ("The {name} moves clean or slightly soiled water in buildings, nurseries and small plants.",
                     "Running against an open outlet it delivers {flow}.",
                     "The highest column that it can still push upwards is {rise}; beyond that the motor turns and nothing arrives.")),
        ("Construction", ("A single impeller sits on a shaft of stainless steel between two greased bearings.",
                          "Where the shaft leaves the housing, a ring of {seal} keeps the liquid inside.",
                          "Without packaging and cable the unit weighs {weight}, so plan how it is lifted before it is unpacked.")),
        ("Installation", ("Set the machine on a level base and leave an arm's length free on the side of the fan.",
                          "The inlet pipe must not be narrower than the flange, and it should fall gently towards the source.",
                          "At one metre from the casing we measured {noise} with all doors closed, which matters next to bedrooms and offices.")),
        ("Maintenance", ("Keep a book of running hours beside the switch.",
                         "After {hours} hours of operation the bearings are opened, cleaned and packed anew.",
                         "The gearbox is filled with {oil}; a wrong level shortens its life more than anything else.")),
        ("Frost and storage", ("Water that freezes inside cracks the housing, and such damage is not covered.",
                               "Unless it has been drained, the pump may stand in the open only down to {cold}.",
                               "Store it dry, and turn the shaft by hand twice a year."))), (
        (0, 1, ("How much can the {name} pump per hour?", "What volume does the {name} deliver without back pressure?")),
        (0, 2, ("What is the maximum height to which the {name} can lift water?", "Up to what delivery head does the {name} work?")),
        (1, 1, ("What material is the shaft gasket of the {name} made of?", "Which substance stops leaks at the axle of the {name}?")),
        (1, 2, ("How heavy is the {name}?", "What does a bare {name} put on the scales?")),
        (2, 2, ("How loud is the {name}?", "What sound level do people near a {name} have to expect?")),
        (3, 1, ("How often must the bearings of the {name} be serviced?", "When is regreasing due on the {name}?")),
        (3, 2, ("How much lubricant goes into the gears of the {name}?", "What quantity of oil do I pour into a {name}?")),
        (4, 1, ("What is the lowest outdoor temperature for a filled {name}?", "How cold may it get around a {name} that still has water in it?")))),
    Kind("village", ("name", "founded", "river", "church", "people", "dish", "feast", "factory", "closed"), (
        ("Ardmuir", "1187", "the Sull", "a slate roof that leans to the north", "412", "smoked eel on barley bread", "the second Sunday of May", "a rope works", "1931"),
        ("Bellhaven", "1342", "the Carrow", "two towers of unequal height", "1,906", "a stew of leeks and mutton", "the eve of Saint Martin", "a glass furnace", "1968"),
        ("Corvanne", "1066", "the Little Aube", "windows made by a blind craftsman", "83", "chestnut pancakes", "midsummer night", "a paper mill", "1899"),
        ("Dunsby Wold", "1720", "the Hasker", "a bell that was cast from cannon", "5,340", "plum dumplings", "the first frost", "a tannery", "1954"),
        ("Eikvik", "1533", "the Grønna", "a painted ceiling of whales", "267", "dried cod with mustard", "the return of the boats", "a cannery", "1987")), (
        ("Beginnings", ("Nobody knows who first cleared the slope above the ford.",
                        "{name} is named for the first time in a tax roll of {founded}, between two places that have vanished since.",
                        "The oldest houses stand along {river}, which flooded their cellars until the embankment was raised.")),
        ("The church", ("Pilgrims came here long before there was a road.",
                        "What visitors remember of the building is {church}.",
                        "Services are held once a month, and in winter the key is with the baker.")),
        ("Work", ("For three generations almost every family earned its wages in {factory} at the lower end of the valley.",
                  "Its gates shut for good in {closed}, and half of the young people left within five years.",
                  "Today most of those who stayed drive to the district town or rent rooms to walkers.")),
        ("Life today", ("At the last census {people} people were living here, more than a third of them over sixty.",
                        "There is one shop, one inn and a library that opens on Thursdays.",
                        "Whoever is invited to a wedding will be served {dish}, without which no meal of honour is complete.")),
        ("The year", ("In January the lanes are empty and the smoke stands straight above the chimneys.",
                      "The great feast of {name} falls on {feast}, when the square is strewn with straw and the band plays until morning.",
                      "Beds have to be booked months ahead for it."))), (
        (0, 1, ("When was {name} first mentioned in writing?", "How old is the earliest record of {name}?")),
        (0, 2, ("Which stream flows through {name}?", "On which river does {name} lie?")),
        (1, 1, ("What is special about the church of {name}?", "Which feature of the house of worship in {name} do tourists talk about?")),
        (2, 0, ("What industry once employed the inhabitants of {name}?", "Where did the grandparents in {name} work?")),
        (2, 1, ("In which year did the plant in {name} cease production?", "When did the big employer of {name} go out of business?")),
        (3, 0, ("What is the population of {name}?", "How many inhabitants does {name} have?")),
        (3, 2, ("What is the traditional food at celebrations in {name}?", "Which speciality do guests of a marriage in {name} eat?")),
        (4, 1, ("When is the annual festival of {name}?", "On what date does {name} celebrate in the streets?")))),
    Kind("bread", ("name", "flour", "water", "rest", "heat", "bake", "salt", "keeps", "spice"), (
        ("Marrow loaf", "spelt", "690 grams", "fourteen hours", "235 degrees", "48 minutes", "21 grams", "five days", "caraway"),
        ("Tinker's round", "light rye", "820 grams", "twenty hours", "250 degrees", "62 minutes", "24 grams", "nine days", "coriander seed"),
        ("Harbour stick", "white wheat", "640 grams", "three hours", "260 degrees", "22 minutes", "19 grams", "one day", "fennel"),
        ("Quarry brick", "whole rye", "905 grams", "thirty hours", "210 degrees", "95 minutes", "26 grams", "three weeks", "blue fenugreek"),
        ("Sunday plait", "emmer", "410 grams of milk instead", "ninety minutes", "185 degrees", "35 minutes", "9 grams", "two days", "cardamom")), (
        ("About this bread", ("The {name} comes from a bakery that closed before the war, whose book survived in a drawer.",
                              "Its crumb gets its character from {flour} flour, of which you weigh out a kilogram.",
                              "Do not be tempted to mix in anything finer.")),
        ("Making the dough", ("Stir the starter into {water} of lukewarm water before the flour comes in, so that no lumps form.",
                              "Add {salt} of salt only after the first folding, since it slows the yeasts.",
                              "The old book also asks for a spoonful of {spice}, crushed just before use.")),
        ("Waiting", ("Cover the bowl with a damp cloth and put it where there is no draught.",
                     "The dough wants {rest} of peace at the temperature of a cellar before it is shaped.",
                     "It is ready when a finger leaves a dent that closes slowly.")),
        ("In the oven", ("Heat the stone early: the oven has to show {heat} when the loaves go in.",
                         "They stay inside for {bake}, the first ten of these with steam.",
                         "Knock on the bottom: a hollow sound says that it is done.")),
        ("Keeping it", ("Let it cool on a rack, however good it smells.",
                        "Wrapped in linen, a {name} stays pleasant to eat for {keeps}.",
                        "After that it still makes good toast."))), (
        (0, 1, ("What grain is the {name} made from?", "Which flour do I need to buy for a {name}?")),
        (1, 0, ("How much liquid goes into the {name}?", "What is the amount of water in the recipe of the {name}?")),
        (1, 1, ("How salty is the {name}, in grams?", "What weight of sodium chloride does the {name} need?")),
        (1, 2, ("Which seasoning gives the {name} its taste?", "What aromatic ingredient does the recipe of the {name} ask for?")),
        (2, 1, ("How long must the {name} prove?", "What is the fermentation time of the {name}?")),
        (3, 0, ("How hot must the stove be for a {name}?", "At what temperature is the {name} baked?")),
        (3, 1, ("How long does the {name} bake?", "After how much time do I take the {name} out of the oven?")),
        (4, 1, ("What is the shelf life of the {name}?", "For how many days can I eat a {name} before it is stale?")))),
    Kind("office rules", ("name", "leave", "notice", "remote", "meal", "doctor", "boss", "parking", "quiet"), (
        ("Lisbon office", "27 days", "six weeks", "three days a week", "11.50 euros", "the third day", "Inês Quaresma", "the garage below the market hall", "two in the afternoon"),
        ("Tampere office", "30 days", "two months", "without any limit", "9.80 euros", "the first day", "Aino Lehtimäki", "the field behind the ice rink", "nine in the morning"),
        ("Halifax office", "20 days", "two weeks", "one day a week", "no allowance", "the fifth day", "Gordon Pellerin", "the street, with a resident's card", "noon"),
        ("Pune office", "24 days", "ninety days", "two days a month", "180 rupees", "the second day", "Meenal Joshi", "level four of tower B", "four in the afternoon"),
        ("Kraków office", "26 days", "three months", "four days a week", "25 zloty", "the fourth day", "Tomasz Wilk", "a yard at the old brewery", "ten in the morning")), (
        ("Time off", ("Everybody at the {name} plans the year together in January, so that no team is left empty.",
                      "Each employee has {leave} of paid holiday, and those that are unused in March are lost.",
                      "Bridge days are drawn by lot.")),
        ("When you are ill", ("Send a message to your team before the day begins; no details are needed.",
                              "A certificate has to be handed in from {doctor} of absence on.",
                              "Come back when you are well, not before.")),
        ("Where we work", ("Desks are shared, and lockers are not.",
                           "Working from home is possible {remote}, after the first three months.",
                           "At {quiet} the quiet hour begins, in which nobody calls a meeting.")),
        ("Food and travel", ("The kitchen has coffee, fruit, and soup on Fridays.",
                             "For lunch outside the company adds {meal} a day to your card.",
                             "Cars may be left in {parking}; bicycles come up in the goods lift.")),
        ("Joining and leaving", ("Your first week belongs to reading and to asking.",
                                 "Either side may end the contract with {notice} of warning, in writing.",
                                 "Questions about the {name} go to {boss}, who runs it."))), (
        (0, 1, ("How much vacation do people in the {name} get?", "What is the annual leave at the {name}?")),
        (1, 1, ("When do I need a sick note in the {name}?", "From when on does the {name} ask for a doctor's letter?")),
        (2, 1, ("Can I do home office in the {name}, and how often?", "What does the {name} say about remote work?")),
        (2, 2, ("When is the time without calls in the {name}?", "At what time do appointments stop for concentrated work in the {name}?")),
        (3, 1, ("What is the meal subsidy of the {name}?", "How much money for eating do staff of the {name} receive?")),
        (3, 2, ("Where do I park at the {name}?", "Is there a place for my vehicle near the {name}?")),
        (4, 1, ("What is the notice period in the {name}?", "How long before quitting must I tell the {name}?")),
        (4, 2, ("Who is the head of the {name}?", "Which manager is in charge of the {name}?")))),
    Kind("program", ("name", "language", "port", "config", "memory", "flag", "licence", "backup", "error"), (
        ("tidewatch", "Rust", "7411", "/etc/tidewatch/main.toml", "90 MB", "--settle", "the Apache licence", "every six hours", "TW-208"),
        ("quillstore", "Go", "9320", "~/.quill/store.yaml", "1.2 GB", "--compact-now", "the MIT licence", "once a night", "QS-17"),
        ("lanternd", "C", "564", "/opt/lantern/lantern.conf", "6 MB", "--no-fork", "the GPL", "only by hand", "E0045"),
        ("marblegrid", "Python", "8899", "marble.json beside the program", "400 MB", "--shards", "a commercial licence", "every minute", "MG_TIMEOUT"),
        ("fennelsync", "Erlang", "15015", "the registry of the cluster", "750 MB", "--heal", "the EUPL", "at each change", "sync/409")), (
        ("What it is", ("{name} collects small records from many machines and gives them to whoever has subscribed.",
                        "It is written in {language}, has no dependencies besides the system's own library, and is built in a minute.",
                        "You may use and pass it on under {licence}.")),
        ("Starting", ("The service is one process that stays in the foreground unless it is told otherwise.",
                      "It listens for clients on port {port}, on all interfaces.",
                      "Its settings are read from {config} at the start, and again on SIGHUP.")),
        ("Options", ("All options have long names; short ones were removed, because nobody remembered them.",
                     "With {flag} it first repairs what an unclean shutdown has left, which may take a while.",
                     "Unknown options are an error.")),
        ("Resources", ("One core is enough for a few thousand records a second.",
                       "Expect it to occupy {memory} of memory with a million subscriptions.",
                       "Disks matter more than processors.")),
        ("Safety", ("A copy of all records is written to the second disk {backup}.",
                    "If subscribers are too slow, the log says {error} and the oldest records are dropped.",
                    "Nothing is ever sent to the makers of {name}."))), (
        (0, 1, ("In which programming language was {name} developed?", "What is {name} coded in?")),
        (0, 2, ("What are the terms of use of {name}?", "Is {name} open source, and under what conditions?")),
        (1, 1, ("Which TCP socket does {name} open?", "What number do I have to allow in the firewall for {name}?")),
        (1, 2, ("Where is the configuration of {name}?", "Which file do I edit to change how {name} behaves?")),
        (2, 1, ("How do I recover {name} after a crash?", "Which command-line switch fixes damaged data of {name}?")),
        (3, 1, ("How much RAM does {name} need?", "What are the memory requirements of {name}?")),
        (4, 0, ("How frequently does {name} make backups?", "When is the data of {name} duplicated?")),
        (4, 1, ("Which code does {name} report when consumers lag behind?", "What message means that {name} loses entries?")))),
    Kind("plant", ("name", "origin", "water", "light", "soil", "height", "flower", "pest", "poison"), (
        ("Velvet dorstenia", "the cliffs of Socotra", "every twelve days", "a bright east window", "pumice with a little loam", "30 centimetres", "March", "thrips", "its milky juice burns the skin"),
        ("Moon aralia", "the cloud forests of Taiwan", "twice a week", "deep shade", "leaf mould", "2.4 metres", "November", "spider mites", "it is harmless"),
        ("Ember sedge", "the dunes of Chile", "once a month", "full sun all day", "pure sand", "45 centimetres", "July", "nothing that we know of", "its seeds upset the stomach"),
        ("Painted hoya", "the islands of Palawan", "every five days", "filtered light under a curtain", "orchid bark", "3 metres if it may climb", "September", "mealybugs", "cats get drowsy from its leaves"),
        ("Glass begonia", "limestone caves of Guangxi", "daily, as mist", "a closed case with a lamp", "moss over gravel", "12 centimetres", "January", "grey mould", "its stems contain oxalic acid")), (
        ("Portrait", ("Few collectors have seen {name} in the wild.",
                      "It comes from {origin}, where it grows out of reach of goats.",
                      "After some years in a pot it reaches {height}.")),
        ("Place and earth", ("A plant that stands wrong cannot be saved by care.",
                             "Indoors it thrives in {light}.",
                             "As for the substrate, give it {soil}; anything else goes sour.")),
        ("Watering and feeding", ("More specimens drown than dry out.",
                                  "It drinks {water} during the growing season, and less when the days are short.",
                                  "Fertilizer is given at half strength, in spring only.")),
        ("Bloom", ("The first buds come in the fourth year.",
                   "Flowers open in {flower} and last for a week or two.",
                   "Remove what has faded, unless you want seed.")),
        ("Trouble", ("Yellow leaves usually mean wet feet.",
                     "The usual visitor is {pest}; look under the leaves once a week.",
                     "For households with children: {poison}."))), (
        (0, 1, ("Where is {name} native?", "What is the natural habitat of {name}?")),
        (0, 2, ("How tall does {name} grow?", "What size will my {name} have when it is grown up?")),
        (1, 1, ("How much sun does {name} need?", "Which spot in the house suits {name}?")),
        (1, 2, ("What potting mix should I use for {name}?", "In which medium do I plant {name}?")),
        (2, 1, ("How often should I water {name}?", "What is the right irrigation rhythm for {name}?")),
        (3, 1, ("In which month does {name} bloom?", "When can I see blossoms on {name}?")),
        (4, 1, ("Which insects or diseases attack {name}?", "What parasite must owners of {name} watch for?")),
        (4, 2, ("Is {name} toxic?", "What danger does {name} pose to toddlers or pets?")))),
    Kind("railway", ("name", "length", "gauge", "tunnel", "train", "fare", "bike", "winter", "station"), (
        ("Halden Line", "74 kilometres", "1,067 millimetres", "the Skarn tunnel", "every two hours", "18 crowns", "travel free outside the rush hours", "a snow plough of 1926", "Upper Halden, at 1,013 metres"),
        ("Vale of Orm Railway", "31 kilometres", "600 millimetres", "no tunnel at all", "on weekends only", "9 pounds", "are not taken", "the line is closed", "Ormsmouth, on a pier"),
        ("Sierra Tuca Line", "212 kilometres", "a metre", "a spiral with seven turns", "twice a day", "45 pesos", "need a ticket for dogs", "chains on the driving wheels", "Laguna Alta, above the clouds"),
        ("North Marsh Line", "58 kilometres", "1,435 millimetres", "a tube below the canal", "four times an hour", "3.20 euros", "go into the last carriage", "electric heaters in the points", "Reedham Halt, which has no road"),
        ("Baikara Branch", "140 kilometres", "1,520 millimetres", "the Bear's Throat", "every other day", "600 roubles", "must be dismantled", "an extra stove in each coach", "Kilometre 88, named after nothing")), (
        ("The line", ("The {name} was built for ore and stayed for people.",
                      "From end to end it measures {length}, of which a fifth lies on bridges.",
                      "Its rails are {gauge} apart, so no carriages of the main network can use it.")),
        ("Sights on the way", ("Sit on the left when you travel upwards.",
                               "The best known work of its engineers is {tunnel}.",
                               "Do not miss {station}, where the crew changes and there is time for tea.")),
        ("Timetable", ("Times hang at each platform, and nowhere else.",
                       "Trains run {train}, with one more on market days.",
                       "Connections wait for up to ten minutes.")),
        ("Tickets", ("They are sold on board, in coins if possible.",
                     "A single journey over the whole distance costs {fare}.",
                     "Bicycles {bike}.")),
        ("When it snows", ("Drifts of three metres were measured in the cutting.",
                           "To keep going in the cold months the {name} relies on {winter}.",
                           "Warm clothes are advised in any case."))), (
        (0, 1, ("How long is the {name}?", "What distance does the {name} cover?")),
        (0, 2, ("What is the track width of the {name}?", "Which gauge does the {name} have?")),
        (1, 1, ("What is the most famous structure on the {name}?", "Does the {name} pass underground anywhere?")),
        (1, 2, ("Which stop of the {name} is worth a visit?", "Where do drivers of the {name} take turns?")),
        (2, 1, ("How often do services operate on the {name}?", "What is the frequency of departures on the {name}?")),
        (3, 1, ("What is the price of a trip on the {name}?", "How much do I pay to ride the {name}?")),
        (3, 2, ("Can I bring my bike on the {name}?", "What are the rules of the {name} for cyclists?")),
        (4, 1, ("How does the {name} cope with winter?", "What keeps the {name} open in snow?")))),
    Kind("ship", ("name", "built", "tons", "cargo", "captain", "lost", "speed", "crew", "relic"), (
        ("Marguerite Sand", "Nantes in 1884", "1,150 tons", "guano", "Yves Kerbrat", "a reef off New Caledonia", "eleven knots", "26 men", "her figurehead, a woman with a compass"),
        ("Brave Corbie", "Leith in 1861", "640 tons", "herring and salt", "Isobel Tait", "ice in the White Sea", "nine knots", "14 men", "a chest of unopened letters"),
        ("Nordstjernen II", "Bergen in 1907", "4,900 tons", "timber", "Halvor Brekke", "a mine in the Skagerrak", "thirteen knots", "41 men", "the telegraph of her bridge"),
        ("Santa Prisca", "Cádiz in 1779", "800 tons", "cacao and silver", "Diego de Arrue", "a fire in the port of Veracruz", "seven knots", "120 men", "a bell without a clapper"),
        ("Kumano Maru", "Nagasaki in 1922", "7,200 tons", "raw silk", "Shigeru Oda", "nothing: she was broken up in 1959", "sixteen knots", "88 men", "the door of the radio room")), (
        ("The ship", ("A model of the {name} stands in the first room, at one to fifty.",
                      "She was launched at {built}, and paid for by a syndicate of nine merchants.",
                      "Fully laden she displaced {tons}.")),
        ("Trade", ("Owners change, routes stay.",
                   "What filled her holds in most years was {cargo}, sold before she had arrived.",
                   "With a fair wind or a clean boiler she made {speed}.")),
        ("Life on board", ("The day was divided by bells, the week by the duff on Sundays.",
                           "{crew} lived before the mast, in a room that you can measure in the third hall.",
                           "Her best known master was {captain}, whose diary is read aloud on Fridays.")),
        ("The end", ("Few ships die of old age.",
                     "Her career was ended by {lost}.",
                     "The inquiry filled four volumes and blamed nobody.")),
        ("In the museum", ("Little is left of her.",
                           "The piece of the {name} that we are proudest of is {relic}.",
                           "Please do not touch it; it is very old and somewhat poisonous."))), (
        (0, 1, ("Where and when was the {name} constructed?", "Which shipyard town gave birth to the {name}?")),
        (0, 2, ("How big was the {name}, by weight?", "What was the tonnage of the {name}?")),
        (1, 1, ("Which goods did the {name} transport?", "What freight did the {name} usually carry?")),
        (1, 2, ("How fast could the {name} go?", "What was the top speed of the {name}?")),
        (2, 1, ("How many sailors served on the {name}?", "What was the size of the company of the {name}?")),
        (2, 2, ("Who commanded the {name}?", "Which skipper of the {name} kept a journal?")),
        (3, 1, ("How did the {name} sink?", "What happened to the {name} in the end?")),
        (4, 1, ("Which object from the {name} is on display?", "What remains of the {name} in the exhibition?")))),
)

LOOKED_UP = 2, 4, 7, 7, 7, 0, 3, 5     # which fact of each kind `lookups` name


def documents():
    """(file name, text in Markdown) of each document."""
    found = []
    for kind in KINDS:
        for values in kind.subjects:
            facts = dict(zip(kind.fields, values))
            parts = [f"# {values[0]}", ""]
            for heading, sentences in kind.sections:
                parts += [f"## {heading}", "", " ".join(each.format(**facts) for each in sentences), ""]
            found.append((file_name(values[0]), "\n".join(parts)))
    return found


def file_name(subject):
    return subject.lower().replace(" ", "-").replace("'", "") + ".md"


def questions(count=300, seed=129):
    """So many of the 320 questions."""
    found = []
    for kind in KINDS:
        for number, values in enumerate(kind.subjects):
            facts = dict(zip(kind.fields, values))
            for section, sentence, phrasings in kind.asked:
                text = phrasings[number % len(phrasings)].format(**facts)
                answer = kind.sections[section][1][sentence].format(**facts)
                found.append(Question(text, file_name(values[0]), answer))
    return random.Random(seed).sample(found, count)


def lookups():
    """Forty questions, one for each document, that name the fact and look for the place: names, codes, numbers."""
    found = []
    for number, kind in enumerate(KINDS):
        for values in kind.subjects:
            facts = dict(zip(kind.fields, values))
            section, sentence, _ = kind.asked[LOOKED_UP[number]]
            plain = kind.sections[section][1][sentence]
            field = next(name for name in kind.fields[1:] if "{" + name + "}" in plain)
            found.append(Question(f"What do the documents say about {facts[field]}?", file_name(values[0]), plain.format(**facts)))
    return found
