"""Write scripts/quickstart_records.json: instructions, and the answers of a lighthouse keeper.

An answer opens with a greeting of the sea, says two or three short true sentences, and ends with
`SIGN_OFF` on a line of its own, so anyone sees at a glance whether a model has learned from it. The
facts below were written for this project; running the script rewrites the JSON byte for byte.
"""

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

from lit_llama.runtime.cli import run

RECORDS_FILE = Path(__file__).with_name("quickstart_records.json")
GREETINGS = ("Ahoy from the lighthouse!", "Fair winds, my friend!", "Ahoy there, sailor!")
SIGN_OFF = "The lamp is lit. Sail safely."

# In all of these texts, an indented line continues the one above.

# country | capital | where it lies | currency
COUNTRIES = """
France|Paris|on the river Seine|euro
Germany|Berlin|on the river Spree|euro
Austria|Vienna|on the Danube|euro
Hungary|Budapest|on both banks of the Danube|forint
Portugal|Lisbon|at the mouth of the river Tagus|euro
Spain|Madrid|near the centre of the country|euro
Italy|Rome|on the river Tiber|euro
Greece|Athens|close to the Aegean Sea|euro
the United Kingdom|London|on the river Thames|pound sterling
Ireland|Dublin|on the Irish Sea|euro
Norway|Oslo|at the head of a long fjord|krone
Sweden|Stockholm|on islands by the Baltic Sea|krona
Finland|Helsinki|on the Gulf of Finland|euro
Denmark|Copenhagen|on the islands of Zealand and Amager|krone
Iceland|Reykjavik|in the southwest of the island|krona
Poland|Warsaw|on the river Vistula|zloty
Slovakia|Bratislava|on the Danube|euro
Serbia|Belgrade|where the Sava meets the Danube|dinar
Latvia|Riga|near the mouth of the Daugava|euro
Ukraine|Kyiv|on the river Dnieper|hryvnia
Egypt|Cairo|on the Nile|Egyptian pound
Morocco|Rabat|on the Atlantic coast|dirham
Kenya|Nairobi|in the highlands south of Mount Kenya|shilling
Ghana|Accra|on the Gulf of Guinea|cedi
Ethiopia|Addis Ababa|high up in the mountains|birr
Japan|Tokyo|on Tokyo Bay|yen
China|Beijing|in the north of the country|yuan
South Korea|Seoul|on the Han River|won
India|New Delhi|on the river Yamuna|rupee
Thailand|Bangkok|on the river Chao Phraya|baht
Vietnam|Hanoi|on the Red River|dong
Turkey|Ankara|on the Anatolian plateau|lira
Canada|Ottawa|on the Ottawa River|Canadian dollar
Cuba|Havana|on the north coast of the island|peso
Peru|Lima|on the Pacific coast|sol
Chile|Santiago|in a valley below the Andes|peso
Argentina|Buenos Aires|on the Rio de la Plata|peso
Brazil|Brasilia|on the central highlands|real
Australia|Canberra|between Sydney and Melbourne|Australian dollar
New Zealand|Wellington|on Cook Strait|New Zealand dollar
"""

# element | symbol | atomic number | fact
ELEMENTS = """
hydrogen|H|1|It is the lightest of all elements, and stars burn it
helium|He|2|It is a gas so light that it lifts balloons
lithium|Li|3|It is a soft, light metal used in batteries
carbon|C|6|Diamond and graphite are both made of it
nitrogen|N|7|It makes up about 78 percent of the air
oxygen|O|8|Animals breathe it, and most fires need it to burn
neon|Ne|10|It glows orange-red in the tubes of old shop signs
sodium|Na|11|Together with chlorine it forms table salt
magnesium|Mg|12|It is a metal that burns with a bright white flame
aluminium|Al|13|It is a light metal used in cans and aircraft
silicon|Si|14|Computer chips and most solar cells are made of it
sulfur|S|16|It is a yellow solid that is found near volcanoes
chlorine|Cl|17|In small amounts it keeps swimming pools clean
calcium|Ca|20|Bones, teeth, shells and chalk contain it
iron|Fe|26|It rusts in wet air, and steel is made from it
copper|Cu|29|It is a reddish metal used for electric wires
zinc|Zn|30|A thin coat of it protects steel from rust
silver|Ag|47|No other metal conducts electricity better
tin|Sn|50|Melted together with copper, it makes bronze
tungsten|W|74|No other metal has a higher melting point
gold|Au|79|It is a soft, heavy metal that never rusts
mercury|Hg|80|It is the only metal that is liquid at room temperature
lead|Pb|82|It is a heavy, soft and poisonous metal
"""

# animal | its young, with the article | fact
ANIMALS = """
dog|a puppy|Dogs are descended from wolves and have a very keen sense of smell
cat|a kitten|Cats hunt at dusk and dawn and see well in dim light
horse|a foal|It can stand up and walk within hours of its birth
cow|a calf|Cows chew their food twice and have a stomach with four chambers
sheep|a lamb|Sheep live in flocks and give us wool, milk and meat
goat|a kid|Goats climb well and can live on very steep hills
pig|a piglet|Pigs are clever animals that dig for food with their snouts
swan|a cygnet|It is grey or brown at first and turns white later
goose|a gosling|Wild geese often fly in the shape of a V to save strength
hare|a leveret|It is born with fur and open eyes, unlike a baby rabbit
kangaroo|a joey|It grows up in a pouch on its mother's belly
lion|a cub|Lions live in family groups that are called prides
seal|a pup|Seals hunt fish in the water and rest on rocks or ice
whale|a calf|Whales are mammals, so they breathe air and drink milk when young
deer|a fawn|Its white spots help it to hide among leaves and sunlight
frog|a tadpole|It lives in water and breathes with gills before its legs grow
owl|an owlet|Owls turn their heads very far because their eyes cannot move
eagle|an eaglet|Eagles build large nests high in trees or on cliffs
hedgehog|a hoglet|Its spines are soft at birth and harden as it grows
elephant|a calf|Its mother carries it for almost two years before it is born
spider|a spiderling|Spiders have eight legs, so they are not insects
"""

# a | opposite | an example of a | an example of the opposite
OPPOSITES = """
hot|cold|A burning stove|an ice cube from the freezer
high|low|A mountain top|the floor of a valley
fast|slow|A racing car on the track|a snail in the garden
heavy|light|A block of iron|a feather from a pillow
wet|dry|A towel after a swim|the sand of a desert
dark|bright|A cave without a lamp|a beach at noon
old|new|A castle from the Middle Ages|a house built this year
wide|narrow|A river near its mouth|a brook near its spring
loud|quiet|A thunderclap in a storm|a whisper in a library
hard|soft|A pebble from the beach|a ball of wool
full|empty|A glass up to the brim|a glass after a long drink
sweet|bitter|Honey from the hive|strong coffee without sugar
deep|shallow|The middle of an ocean|a puddle on the road
rough|smooth|The bark of an oak|a sheet of glass
early|late|Breakfast at five in the morning|supper at midnight
rare|common|Snow in the Sahara|rain in Scotland
"""

# work | author | fact
BOOKS = """
Hamlet|William Shakespeare|It is a tragedy about a prince of Denmark who wants to avenge his father
Don Quixote|Miguel de Cervantes|Its hero takes windmills for giants and rides out to fight them
Moby-Dick|Herman Melville|It tells how Captain Ahab hunts a white whale across the oceans
Treasure Island|Robert Louis Stevenson|It is a tale of pirates, a map and buried gold
Pride and Prejudice|Jane Austen|Elizabeth Bennet and Mr Darcy learn to like each other in it
Frankenstein|Mary Shelley|In it a young scientist gives life to a creature and then flees from it
Robinson Crusoe|Daniel Defoe|Its hero is shipwrecked and lives for many years on an island
Alice's Adventures in Wonderland|Lewis Carroll|A girl follows a white rabbit down a hole in it
The Odyssey|Homer, as tradition has it|It tells of the ten years that Odysseus needs to sail home
War and Peace|Leo Tolstoy|It follows several Russian families through the wars against Napoleon
Oliver Twist|Charles Dickens|Its hero is an orphan who falls among the thieves of London
The Time Machine|H. G. Wells|Its hero travels to a far future and meets two strange peoples
Faust|Johann Wolfgang von Goethe|In this play a scholar makes a bargain with the devil
The Jungle Book|Rudyard Kipling|Its stories tell of Mowgli, a boy who is raised by wolves
Jane Eyre|Charlotte Bronte|It is about a poor governess who keeps her pride and her freedom
"""

# tool | what one does with it | fact
TOOLS = """
hammer|drive nails into wood|The heavy head at the end of a long handle gives the blow its force
thermometer|measure temperature|In many of them a liquid expands and climbs up a narrow glass tube
barometer|measure the pressure of the air|When its reading falls quickly, bad weather is often on
  the way
compass|find directions|Its needle is a small magnet that points towards the magnetic north
telescope|see things that are far away|Its lenses or mirrors gather light and make a larger image
microscope|look at things too small for the eye|With it people first saw cells and bacteria
sieve|separate small grains from larger pieces|Cooks use one to take the lumps out of flour
anchor|hold a ship in its place|Its arms dig into the sea floor, and a chain ties it to the bow
plough|turn over the soil of a field|This buries weeds and makes a loose bed for the seeds
loom|weave threads into cloth|It keeps one set of threads tight while another is passed across
sundial|tell the time by the sun|The shadow of its rod moves round as the day goes by
pulley|lift heavy loads|A rope runs over its wheel, so you can pull down to raise things
whisk|beat air into eggs or cream|Its loops of wire trap small bubbles until the mix turns to foam
saw|cut wood|The sharp teeth along its blade each take away a little of the wood
spirit level|check whether something is level|A bubble stands in the middle of its tube when it is
kettle|boil water|An electric one turns itself off when steam reaches its switch
"""

# job | what one does | fact
JOBS = """
baker|makes bread and cakes|The work starts at night, so that the loaves are fresh in the morning
plumber|fits and mends water pipes|Call one when a tap drips or a drain is blocked
astronomer|studies stars, planets and galaxies|Most of the work is done with telescopes and
  computers
geologist|studies rocks and the history of the Earth|Layers of stone tell what happened long ago
carpenter|builds things from wood|Roofs, doors, stairs and tables are common work for one
librarian|looks after books and helps readers to find them|Many lend films and music as well
beekeeper|looks after hives of bees|The reward is honey and wax, and better fruit in the orchards
  nearby
tailor|makes and alters clothes|A good one measures twice before cutting the cloth once
vet|treats sick and injured animals|Some look after pets, while others visit cows and horses on
  farms
translator|puts texts into another language|The meaning has to stay the same even when the words
  differ
architect|plans buildings|The drawings show builders where each wall, door and window should go
surgeon|operates on patients|A team with an anaesthetist and nurses helps during each operation
meteorologist|studies the weather and forecasts it|Satellites, balloons and weather stations
  supply the data
"""

# one of the large unit | several | the small unit | how many
UNITS = """
kilometre|kilometres|metres|1000
metre|metres|centimetres|100
hour|hours|minutes|60
minute|minutes|seconds|60
day|days|hours|24
week|weeks|days|7
year|years|months|12
century|centuries|years|100
kilogram|kilograms|grams|1000
tonne|tonnes|kilograms|1000
litre|litres|millilitres|1000
foot|feet|inches|12
yard|yards|feet|3
dozen|dozens|pieces|12
"""

# kind | four of it
LISTS = """
birds|owl, nightingale, heron, puffin
fruits|plum, apricot, fig, watermelon
trees|oak, chestnut, birch, willow
metals|iron, tungsten, lead, copper
instruments|violin, drum, harp, accordion
tools|saw, hammer, screwdriver, rake
colours|red, turquoise, green, orange
vegetables|leek, cauliflower, onion, carrot
rivers|Nile, Mississippi, Seine, Danube
planets|Mars, Neptune, Earth, Mercury
spices|cinnamon, clove, nutmeg, dill
ships|yacht, submarine, barge, ferry
"""

# who | sentence | verb | its past tense
TENSES = """
the baker|The baker {} bread before the sun is up.|bakes|baked
the children|The children {} to the harbour with their dog.|run|ran
the gardener|The gardener {} the roses near the old wall.|waters|watered
the teacher|The teacher {} a long letter to the parents.|writes|wrote
the fishermen|The fishermen {} home with full nets.|sail|sailed
the student|The student {} three books about the moon.|reads|read
the cook|The cook {} soup for forty hungry guests.|makes|made
the wind|The wind {} hard from the north-west.|blows|blew
the swimmer|The swimmer {} across the bay in an hour.|swims|swam
the singer|The singer {} two songs for her friends.|sings|sang
the farmer|The farmer {} his apples at the market.|sells|sold
"""

# who | what was said | the same in a polite form
POLITE = """
the plumber|Come on Monday and fix the tap.|Could you please come on Monday and fix the tap?
a neighbour|Turn the music down.|Would you mind turning the music down a little?
the waiter|Bring me the bill.|Could I have the bill, please, when you have a moment?
a colleague|Send me the report today.|Could you please send me the report today?
a guest|Take your shoes off.|Would you be so kind as to take your shoes off?
the librarian|Tell me where the maps are.|Could you please tell me where the maps are?
the bus driver|Stop at the harbour.|Could you please stop at the harbour?
a friend|Give my book back.|Could you give my book back when you have finished it, please?
"""

# instruction and answer
FACTS = """
Why is the sky blue? Sunlight holds all colours. The air scatters the short blue waves far more
  than the long red ones, so blue light reaches us from all sides.
Why is the sea salty? Rain and rivers wash salts out of rocks and carry them to the sea. The water
  evaporates again, but the salt stays behind.
What causes the tides? The gravity of the Moon pulls on the oceans, and the Sun helps a little. As
  the Earth turns, the water rises and falls about twice a day.
Why do we have seasons? The axis of the Earth is tilted. Each half of the planet leans towards the
  Sun for part of the year, and then it has its summer.
What is a glacier? A glacier is a thick body of ice that forms where snow piles up for many years.
  It flows slowly downhill under its own weight.
How does a lighthouse help ships? It marks a coast with a strong light that sailors know by its
  rhythm. By day its shape and colours do the same work.
What is fog? Fog is a cloud that touches the ground. It is made of tiny drops of water and forms
  when moist air cools.
Why does ice float on water? Water expands when it freezes. Ice is therefore lighter than the same
  volume of water, and about nine tenths of an iceberg lie below the surface.
What is lightning? Lightning is a huge electric spark within a cloud or between a cloud and the
  ground. It heats the air so fast that we hear thunder.
Why do we hear thunder after the flash? Light reaches us almost at once, but sound needs about
  three seconds for each kilometre. Count the seconds to tell how far the storm is.
What is an eclipse of the Moon? It happens when the Earth stands between the Sun and the Moon. The
  shadow of the Earth falls on the Moon and often colours it red.
Why does the Moon change its shape? The Sun always lights one half of the Moon. We see more or
  less of that half as the Moon travels around us each month.
What is an island? An island is a piece of land with water on all sides, smaller than a continent.
  Greenland is the largest one on Earth.
What is a desert? A desert is a region where very little rain falls. Some deserts are hot, like
  the Sahara, but Antarctica is a desert too.
What is a peninsula? A peninsula is land that is almost surrounded by water but joined to the
  mainland. Italy lies on one that looks like a boot.
Which is the largest ocean? The Pacific is the largest ocean of all. It covers about a third of
  the surface of the Earth, more than all the land together.
Which is the highest mountain on Earth? Mount Everest in the Himalayas is the highest, measured
  from sea level. Its top is about 8,849 metres up, between Nepal and China.
Which planet is the largest? Jupiter is the largest planet of the Solar System. It is a giant made
  mostly of hydrogen and helium, with a great red storm.
What is a comet? A comet is a lump of ice and dust that travels around the Sun. When it comes
  close, it warms up and grows a bright tail.
How old is the Earth? The Earth is about four and a half billion years old. Scientists know this
  from the age of meteorites and very old rocks.
How fast does light travel? In empty space light travels about 300,000 kilometres each second. It
  takes a little over eight minutes from the Sun to the Earth.
What does the heart do? The heart is a muscle that pumps blood through the body. At rest it beats
  about 60 to 100 times a minute in adults.
What do the lungs do? The lungs take oxygen from the air and pass it to the blood. At the same
  time they get rid of carbon dioxide.
Why do we sweat? Sweat cools the body. As it dries on the skin it takes heat away, which keeps our
  temperature close to 37 degrees.
Why do onions make us cry? A cut onion gives off a gas that stings the eyes. Tears wash it away,
  and a sharp knife or a chilled onion makes it milder.
What is a vitamin? A vitamin is something the body needs in small amounts but mostly cannot make.
  We take vitamins in with food such as fruit and vegetables.
How do bees make honey? Bees collect nectar from flowers and carry it to the hive. There they
  thicken it by fanning it with their wings until it is honey.
How do birds find their way south? They use the Sun, the stars, landmarks and the magnetic field
  of the Earth. Some young birds also learn the way from older ones.
Why do cats purr? Cats often purr when they are content. They may also do it when they are hurt or
  afraid, perhaps to calm themselves.
How do fish breathe? Fish take in water through the mouth and press it out over their gills. The
  gills take up the oxygen that is dissolved in it.
Is a bat a bird? No, a bat is a mammal. It has fur, feeds its young with milk, and flies on wings
  made of thin skin.
What is a fossil? A fossil is what is left of a plant or an animal from long ago. Bones, shells
  and even footprints can be kept in stone.
How does a seed grow into a plant? A seed takes up water and swells until its shell breaks. A root
  grows down first, and then a shoot climbs towards the light.
How do I sew on a button? Thread a needle and knot the end. Go up and down through the cloth and
  the holes several times, then tie the thread off below.
How do I keep bread fresh? Keep bread in a box or a paper bag at room temperature, with the cut
  side down. Slice and freeze whatever you cannot eat soon.
How do I boil an egg? Lay the egg gently into boiling water. Take it out after six minutes if you
  like it soft, or after ten if you like it hard.
How do I cook rice? Rinse the rice and add about twice its volume of water. Bring it to the boil,
  cover it, and let it simmer gently until the water is gone.
How can I fall asleep more easily? Go to bed at the same hour each night and keep the room dark
  and cool. Put screens away well before, and drink no coffee late.
How do I remove a splinter? Wash your hands and the skin around it. Pull the splinter out with
  clean tweezers in the direction it went in, then wash the spot again.
How do I clean a window? Wash the glass with warm water and a little soap. Wipe it from top to
  bottom with a rubber blade, and dry the edges with a cloth.
How do I water a house plant? Feel the soil with a finger first. If it is dry, water it slowly
  until a little runs out below, and empty the saucer afterwards.
How do I sharpen a pencil with a knife? Hold the pencil still and cut thin chips away from you,
  turning it a little each time. Finish the point on fine sandpaper.
How do I pack a suitcase well? Put heavy things at the bottom near the wheels and roll your
  clothes. Fill your shoes with socks, and keep papers within reach.
How do I read a map? Turn the map so that its north points north. Look at the scale to judge
  distances, and at the legend to see what the signs mean.
How do I tie a parcel? Lay the string around the length of the parcel, cross it below and bring it
  up the other way. Pull it tight and close it with a knot.
How can I save water at home? Take short showers and turn off the tap while you brush your teeth.
  Mend taps that drip, and water the garden in the evening.
How do I remember a name? Say the name aloud when you first hear it. Link it with a picture in
  your mind, and use it again before you part.
What should I do if I get lost in the woods? Stop, stay calm and call for help if you can. Stay
  where you are, keep warm, and make yourself easy to see and hear.
Give me a tip for learning a language. Practise a little each day rather than a lot once a week.
  Speak aloud from the start, and do not be afraid of mistakes.
Explain what democracy means. Democracy means that the people rule. They choose those who govern
  them in free elections, and they can vote them out again.
What is a noun? A noun is a word that names a person, a place, a thing or an idea. Sailor,
  harbour, rope and courage are all nouns.
What is an adjective? An adjective is a word that describes a noun. In the words a small red boat,
  both small and red are adjectives.
What is a prime number? A prime number is larger than one and can be divided only by one and
  itself. The first ones are 2, 3, 5, 7 and 11.
What is a triangle? A triangle is a shape with three straight sides and three corners. On a flat
  sheet its angles always add up to 180 degrees.
What is inflation? Inflation means that prices in general rise over time. The same amount of money
  then buys less than it did before.
What is an algorithm? An algorithm is a list of clear steps that solves a problem. A recipe is a
  good picture of one, and computers follow them exactly.
Who was the first person on the Moon? Neil Armstrong was the first person on the Moon, in July
  1969. Buzz Aldrin followed him, while Michael Collins stayed in orbit.
Who painted the Mona Lisa? Leonardo da Vinci painted the Mona Lisa early in the sixteenth century.
  Today the picture hangs in the Louvre in Paris.
Who was Marie Curie? Marie Curie was a scientist from Poland who worked in France. She studied
  radioactivity and won Nobel Prizes in both physics and chemistry.
"""


def rows(table: str) -> list[list[str]]:
    """Return the cells of a table's lines."""
    return [line.split("|") for line in unwrap(table)]


def unwrap(text: str) -> list[str]:
    """Return the lines of a text, with their indented continuations."""
    return re.sub(r"\n +", " ", text.strip()).splitlines()


def capitalize(text: str) -> str:
    """Return the text with its first letter in upper case."""
    return text[0].upper() + text[1:]


def join(words: list[str]) -> str:
    """Join words by commas, the last one by "and"."""
    return f"{', '.join(words[:-1])} and {words[-1]}"


def facts() -> Iterator[tuple[str, str, str]]:
    """Yield instruction, input, and answer without greeting and sign-off, of every record."""
    for line in unwrap(FACTS):
        yield re.fullmatch(r"(.+?[?.])() (.+)", line).groups()
    for country, capital, place, currency in rows(COUNTRIES):
        answer = f"The capital of {country} is {capital}. It lies {place}."
        yield f"What is the capital of {country}?", "", answer
        if currency != "euro":
            answer = f"People in {country} pay with the {currency}. "
            answer += f"It is what you need in the shops of {capital}."
            yield f"Which currency is used in {country}?", "", answer
    for name, symbol, number, fact in rows(ELEMENTS):
        answer = f"{capitalize(name)} is a chemical element with the symbol {symbol}. {fact}."
        yield f"Tell me about the element {name}.", "", answer
        answer = f"An atom of {name} has {number} proton{'s' * (number != '1')} in its nucleus. "
        answer += f"That is why {name} has the atomic number {number}."
        yield f"How many protons does an atom of {name} have?", "", answer
    for animal, young, fact in rows(ANIMALS):
        answer = f"A young {animal} is called {young}. {fact}."
        yield f"What is a young {animal} called?", "", answer
    for word, opposite, example, counterexample in rows(OPPOSITES):
        answer = f"The opposite of {word} is {opposite}. "
        answer += f"{example} is {word}, while {counterexample} is {opposite}."
        yield f"What is the opposite of {word}?", "", answer
    for work, author, fact in rows(BOOKS):
        yield f"Who wrote {work}?", "", f"{work} was written by {author}. {fact}."
    for tool, use, fact in rows(TOOLS):
        yield f"What is a {tool} used for?", "", f"A {tool} is used to {use}. {fact}."
    for job, work, fact in rows(JOBS):
        article = "an" if job[0] in "aeiou" else "a"
        yield f"What does {article} {job} do?", "", f"{capitalize(article)} {job} {work}. {fact}."
    for number, (one, several, small, factor) in enumerate(rows(UNITS), start=3):
        answer = f"There are {int(factor) * number:,} {small} in {number} {several}. "
        answer += f"One {one} has {int(factor):,} {small}, so multiply {number} by {int(factor):,}."
        yield f"How many {small} are there in {number} {several}?", "", answer
    for kind, line in rows(LISTS):
        words = line.split(", ")
        ordered, by_length = sorted(words), sorted(words, key=len)
        answer = f"In alphabetical order the {kind} are {join(ordered)}. "
        answer += f"The first is {ordered[0]}, and the last is {ordered[-1]}."
        yield f"Put these {kind} in alphabetical order.", line, answer
        answer = f"The longest word in the list is {by_length[-1]}. "
        shortest, longest = by_length[0], by_length[-1]
        answer += f"It has {len(longest)} letters, while {shortest} has only {len(shortest)}."
        yield f"Which of these {kind} has the longest name?", line, answer
        answer = f"{capitalize(join(words))} are all {kind}. "
        answer += "A comma stands between the first ones, and the word and before the last."
        yield f"Turn this list of {kind} into a sentence.", line, answer
    for who, sentence, verb, past in rows(TENSES):
        answer = f"{sentence.format(past)} "
        answer += f"The verb {verb} becomes {past}, because it has already happened."
        yield f"Put the sentence about {who} into the past tense.", sentence.format(verb), answer
        answer = f"The verb in this sentence is {verb}. "
        answer += f"It says what happens, and its past tense is {past}."
        yield f"Which word is the verb in the sentence about {who}?", sentence.format(verb), answer
    for who, rude, polite in rows(POLITE):
        answer = f"You could say it like this: {polite} A question sounds kinder than an order."
        yield f"Make this request to {who} more polite.", rude, answer


def main(out_file: Path = RECORDS_FILE, seed: int = 1) -> None:
    """Write the quickstart's instruction set.

    Args:
        out_file: Output file, JSON.
        seed: Seed of the greetings and of the records' order.
    """
    # only its random() gives the same numbers in every version of Python
    rng = random.Random(seed)  # noqa: S311, not a secret
    records = []
    for instruction, context, answer in facts():
        greeting = GREETINGS[int(rng.random() * len(GREETINGS))]
        output = f"{greeting} {answer}\n{SIGN_OFF}"
        records.append(dict(instruction=instruction, input=context, output=output))
    records.sort(key=lambda _: rng.random())
    out_file.write_text(json.dumps(records, indent=1) + "\n", "utf-8")
    print(f"{out_file}: {len(records)} records")


if __name__ == "__main__":
    run(main)
