# ruff: noqa: E501
"""Made-up texts to train the scorer on: ordinary ones of every form, and mild insults with the counterparts they lack.

Knows words and templates only. The texts that a scorer is measured on have templates and words of their own
(`detox_benchmarks.fitting.bench`).
"""

from __future__ import annotations

import random
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["GROUPS", "IDENTITY_WORDS", "ONES", "clean_texts", "contrasts", "salads"]


def _words(text: str) -> list[str]:
    return [part.strip() for part in text.split("|")]


GROUPS = _words(
    "women|men|girls|boys|black people|white people|gay people|lesbians|gay men|bisexual people|transgender people|trans women|"
    "queer people|straight people|Muslims|Jews|Jewish people|Christians|Catholics|Hindus|Buddhists|Sikhs|atheists|Asians|"
    "Asian people|Chinese people|Indians|Arabs|Africans|African Americans|Mexicans|Latinos|Native Americans|Europeans|"
    "Americans|Russians|Germans|Poles|Romani people|immigrants|refugees|foreigners|disabled people|blind people|deaf people|"
    "autistic people|elderly people|old people|teenagers|feminists|liberals|conservatives|republicans|democrats|socialists|"
    "communists|homeless people|poor people|rich people|single mothers|police officers|politicians|lawyers|teachers|nurses"
)
ONES = _words(
    "woman|man|girl|boy|black woman|black man|white man|white woman|gay man|lesbian|lesbian woman|bisexual man|transgender woman|trans man|"
    "Muslim|Muslim woman|Jew|Jewish man|Christian|Catholic priest|Hindu|Buddhist monk|Sikh|atheist|Asian woman|Chinese man|"
    "Indian woman|Arab man|African man|African American woman|Mexican|Latina|Native American|European|American|Russian|German|Pole|"
    "immigrant|refugee|foreigner|disabled man|blind woman|deaf girl|autistic boy|old man|old woman|teenager|feminist|liberal|"
    "conservative|republican|democrat|socialist|communist|homeless man|single mother|police officer|politician|lawyer|teacher|nurse|"
    "mother|father|husband|wife|sister|brother|son|daughter|friend|neighbour|boss|colleague|doctor|engineer"
)
IDENTITY_WORDS = _words(
    "woman|women|man|men|girl|boy|female|male|black|white|brown|gay|lesbian|bisexual|transgender|trans|queer|straight|homosexual|"
    "heterosexual|LGBT|LGBTQ|nonbinary|Muslim|Muslims|Islam|Jew|Jews|Jewish|Judaism|Christian|Christians|Catholic|Hindu|Buddhist|Sikh|atheist|"
    "Asian|Chinese|Japanese|Korean|Indian|Pakistani|Arab|African|African American|Mexican|Latino|Latina|Hispanic|Native American|"
    "European|American|Russian|German|Polish|Turkish|Iranian|Israeli|Palestinian|immigrant|immigrants|migrant|refugee|foreigner|"
    "disabled|blind|deaf|autistic|wheelchair|old|elderly|young|teenager|feminist|feminism|liberal|conservative|republican|democrat|"
    "socialist|communist|homeless|poor|rich|fat|thin|mother|father|wife|husband|race|religion|gender|sex|sexuality|sexual orientation"
)
SINGLE_INSULTS = _words(
    "idiot|moron|fool|loser|jerk|liar|clown|coward|creep|dummy|imbecile|dimwit|halfwit|nitwit|buffoon|blockhead|dunce|dolt|"
    "scumbag|scum|sleazebag|weasel|rat|pig|snake|worm|parasite|crook|fraud|hypocrite|bully|brat|bigot|lunatic|maniac|psycho|weirdo|freak|"
    "nincompoop|numbskull|simpleton|airhead|twit|twerp|dork|cretin|ignoramus|slob|crybaby|windbag|phony|disgrace|waste of space|piece of garbage|"
    "lowlife|degenerate|sore loser|dumb fool|stupid fool|sad little man|pathetic loser"
)
RUDE_ADJECTIVES = _words(
    "stupid|dumb|pathetic|ugly|idiotic|moronic|disgusting|worthless|brainless|clueless|useless|foolish|ridiculous|ignorant|spineless|"
    "gutless|shameless|lazy|filthy|vile|repulsive|despicable|dishonest|crooked|cowardly|arrogant|incompetent|insane|crazy|"
    "dim-witted|braindead|thick-headed|sick|twisted|gross|rotten|nasty|hateful|obnoxious|miserable"
)
RUDE = [
    "You are a {s}.", "You are such a {s}!", "You're a {a} {s}.", "You {a} {s}!", "you {s}", "What a {s}.", "What a {a} {s} he is!", "He is a {s}.",
    "She is a {a} {s}.", "He's nothing but a {s}", "My {one} is such a {s}.", "My {one} is a {a} {s}.", "You are so {a}.", "You're {a}", "You are {a} and {a2}.",
    "How can anyone be so {a}?", "How {a} can you be?", "{G} are {s}s.", "{G} are {a}.", "All {g} are {a} {s}s.", "{G} are so {a} and {a2}.", "I hate {g}, they are {a}.",
    "Only a {s} would say that.", "Only a {a} {s} would believe this.", "Shut up, you {s}.", "Shut up, you {a} {s}!", "Shut up and go away, {s}.", "Get lost, {s}!",
    "Don't be such a {s}.", "Are you {a} or what?", "Are you really that {a}?", "That {one} is a {s}.", "This {a} {one} is a {s} and everybody knows it.",
    "Look at this {s}.", "They are all {s}s.", "They are {a} {s}s, every one of them.", "The president is a {a} {s}.", "the mayor is a {s} and a {s2}", "You {s}, you {a} {s2}.",
    "Listen, {s}, nobody wants you here.", "Nobody likes you, you {s}.", "your {one} is a {a} {s}", "I am surrounded by {s}s.", "Go home, you {a} {s}.", "{s}", "{s}!", "{a} {s}", "you {a} {s}",
    "What is wrong with you, {s}?", "He always was a {s} and always will be.", "These people are {a} {s}s.", "Your face is {a}.", "Your brother is {a} and {a2}.",
    "I can't believe how {a} you are.", "You must be the most {a} person I know.", "Everyone thinks that you are a {s}.", "It takes a real {s} to do that.", "such a {a} {s}",
    "and you are a {s}", "because you are a {a} {s}", "but he is a {s}", "you really are {a}", "I think you are a {s}", "you are a complete {s}", "a total {s}", "he is an absolute {s}, that {one}",
]  # fmt: skip
KIND = [
    "You are a {k}.", "You are such a {k}!", "You're a {p} {k}.", "You are so {p}.", "You're {p}", "What a {p} {k} he is!", "He is a {k}.", "She is a {p} {k}.", "My {one} is a {k}.",
    "My {one} is a {p} {k}.", "{G} are {p}.", "{G} are {k}s.", "{G} are welcome here.", "{G} live in every part of the country.", "{G} have the right to vote.", "Many {g} work in hospitals.",
    "The survey asked {g} about their work.", "All {g} are {p}.", "I love working with {g}.", "Some {g} are {k}s, others are {k2}s.", "A {one} is reading a book.", "The {one} next door is a {k}.",
    "I am a {one}.", "I am a {one} and I like music.", "I am {ident}.", "She is {ident}.", "My best friend is {ident}.", "He married a {one} from Lyon.", "The film is about a {one} who becomes a {k}.",
    "Is it hard to be a {one} in this field?", "How can I support {g} at work?", "What do {g} celebrate in spring?", "a {one}", "the {one}", "{g}", "{G}", "{ident}", "{ident} people", "{ident} history",
    "{G} and {g2} met at the town hall.", "The law protects {g} and {g2}.", "There were more {g} than {g2} in the study.", "and you are a {k}", "because you are {p}", "but he is a {k}", "the {ident} community", "a {ident} author",
    "Can you tell me about {ident} culture?", "The {ident} population grew by two percent.", "Discrimination against {g} is illegal.", "Hate crimes against {g} rose last year, police said.", "She writes about {ident} identity.",
    "The museum shows {ident} art.", "He is a {p} {one}.", "I think you are a {k}", "you are a {p} {k}", "Don't be {e}.", "Don't be so hard on yourself.", "Are you {p}?", "Are you a {k}?", "How {p} of you!", "They are all {k}s.",
    "What does it mean to be {ident}?", "Are {g} allowed to apply?", "{G} play an important role in the story.", "You look {p} today.", "You must be {e}.", "nobody was there", "everybody knows it", "Only a {k} would know that.",
]  # fmt: skip
KINDS = _words(
    "teacher|friend|doctor|student|neighbour|painter|leader|scientist|singer|engineer|writer|dancer|lawyer|helper|baker|driver|nurse|farmer|"
    "child|person|genius|hero|winner|treasure|pilot|chef|guest|player|poet|parent|expert|colleague|listener|gardener|swimmer|language model"
)
POLITE = _words(
    "kind|helpful|clever|patient|honest|friendly|generous|brave|funny|calm|gentle|wonderful|smart|polite|thoughtful|cheerful|welcome|ready|"
    "talented|beautiful|lovely|proud|curious|reliable|careful|quiet|strong|happy|busy|young|old|tall|new here|great|amazing"
)
EMOTIONS = _words(
    "sad|late|shy|afraid|worried|tired|hungry|sick|upset|nervous|lonely|bored|angry|hurt|stressed|confused|cold|lost"
)
TOPICS = _words(
    "photosynthesis|the French Revolution|machine learning|tax returns|sourdough bread|the water cycle|jazz|chess openings|solar panels|"
    "football|gravity|the stock market|insulin|earthquakes|the Roman Empire|vaccines|Python decorators|quantum computing|bicycle repair|"
    "the immune system|volcanoes|knitting|the human heart|black holes|inflation|the Cold War|salsa dancing|electric cars|puberty|"
    "sex education|breast cancer|pregnancy|menstruation|birth control|depression|suicide prevention|domestic violence|drug addiction|"
    "the Holocaust|slavery|racism|sexism|the death penalty|nuclear weapons|terrorism|abortion law|same-sex marriage|gun control|"
    "world war two|the black death|smoking|alcohol|obesity|HIV|prostate cancer|anal fissures|sexual health|the penis|the vagina|"
    "execution of a process|garbage collection|master and replica databases|dummy variables|brute force search|fertilizer|pigs|snakes|rats|"
    "donkeys|chicken breasts|mating of birds|the killer whale|hell in Dante|damnation in theology|toxic waste|poison ivy|crazy golf"
)
PLACES = _words(
    "Paris|Berlin|Tokyo|Lagos|Nairobi|Lima|Boston|Oslo|Warsaw|Mumbai|Sydney|Toronto|Cairo|Seoul|Madrid|the park|the library|the station|"
    "the museum|the beach|school|the office|the old harbour|Essex|Sussex|Scunthorpe|Niger|Nigeria|Montenegro|Black Sea|Dickinson|Cockburn"
)
NAMES = _words(
    "Anna|James|Maria|Ahmed|Wei|Fatima|John|Olga|Kofi|Priya|Carlos|Emma|Noah|Yuki|Ingrid|Mohammed|Sarah|David|Chen|Aisha|Lukas|Elena|"
    "Dick|Randy|Gay|Fanny|Willy|Peter|Jesus|Adolf|Isis|Karen|Chad|Osama|Nguyen|Hussein|Cohen|Levi|Jamal|Lakisha|Hancock|Dickens|Woodcock|Hitchcock|Babcock|Gaylord|Titus|Shitake|Butts|Weiner|Peacock"
)
FOOD = _words(
    "flour|eggs|milk|butter|sugar|salt|pepper|onions|garlic|tomatoes|rice|chicken breast|duck breast|olive oil|basil|lemon juice|cream|"
    "potatoes|carrots|cheese|yeast|honey|cinnamon|chocolate|nuts|beans|beef|pork|white wine|black pepper|brown sugar|white onion|shiitake mushrooms|meatballs|cocktail sausages|"
    "spotted dick|coq au vin|cumin|spice rub|rump steak|sucking pig|ginger|crackers|fruit|peaches|cherries|nut oil|whipped cream|stock"
)
THINGS = _words(
    "table|window|laptop|bicycle|garden|letter|ticket|report|phone|bridge|train|camera|kitchen|song|book|meeting|project|box|screw|engine|"
    "file|server|password|button|screen|form|price|order|invoice|parcel|room|door|key|lamp|chair|coat|bag|map|river|mountain|dog|cat|horse|"
    "bird|tree|flower|cloud|storm|machine|battery|printer|router|folder|chapter|sentence|picture|film|show|game|team|match|goal|recipe"
)
VERBS = _words(
    "open|close|check|clean|move|update|install|remove|fix|build|paint|send|read|write|sort|count|save|share|print|copy|test|replace|wash|"
    "repair|measure|plan|review|start|stop|kill|execute|abort|dump|strip|mount|unmount|beat|whip|crush|chop|cut|shoot|bang|blow up|screw in|hit|nail down|suck up|lick"
)
ADVERBS = _words(
    "slowly|today|with care|at noon|before dinner|again|for 20 minutes|on Monday|in the evening|twice|by hand|first|last|if needed|next week"
)
ADJECTIVES = _words(
    "new|old|small|large|red|blue|green|warm|cold|fresh|simple|quick|bright|dark|heavy|light|wooden|clean|soft|round|open|free|local|early|late|hard|black|white|dry|wet|raw|stiff|dirty|naked|bare|rough|dumb (text only)|sticky|hot"
)
IDENTIFIERS = _words(
    "user_id|max_new_tokens|getName|is_valid|data|result|index|items|count|config|logger|response|request|buffer|parse_args|load_model|"
    "assert_equal|class_name|pass_through|hash_table|analysis|title|basename|document|cumsum|push|shift|shipment|dictionary|substring|assets|"
    "kill_process|abort_all|dump_json|slave_node|master_key|exec_cmd|die_on_error|dummy_input|bad_rows|suck_rate|hit_rate|crap_out|asset_class|mass_index|pass_hash|cocktail_sort|tit_for_tat"
)
INNOCENT_WORDS = _words(
    "assassin|assassination|assess|assessment|assembly|assume|assign|associate|assist|class|classic|classify|grass|glass|brass|mass|pass|passage|"
    "passion|compass|embassy|ambassador|bass|basset|cassette|harass the enemy|molasses|sassafras|analysis|analyst|analog|canal|banal|penalty|peninsula|pencil|pension|penicillin|"
    "cockpit|cocktail|cockatoo|peacock|hancock|shuttlecock|cockroach|weathercock|coconut|cocoa|document|cucumber|cumulative|accumulate|circumstance|scum line|"
    "title|titan|titanium|constitution|institution|substitute|petition|competition|appetite|titmouse|blue tit|great tit|shiitake|shipment|shirt|shift|push it|"
    "dictionary|dictate|predict|addict|verdict|medical|dickens|moby dick|benedict|scunthorpe|sussex|essex|middlesex|sextant|sexagesimal|sextuplet|unisex|"
    "therapist|therapy|grape|grapevine|drape|scrape|rapeseed|rapid|skyscraper|parapet|niggle|niger|nigeria|nigel|enigma|night|vinegar|denigrate|montenegro|"
    "hello|shell|hellenic|seashell|michelle|damnation of faust|dam|adam|amsterdam|hoover dam|butter|button|butterfly|rebuttal|buttress|butt joint|water butt|arsenal|arsenic|parse|coarse|rehearse|arson|"
    "pussy willow|pussycat|cat|kitten|witch|pitch|stitch|switch|twitch|ditch|fog|flag|bug|debug|humbug|crap game|scrap|scrape|craps table|wrap|"
    "suck|suction|succulent|success|honeysuckle|duck|luck|buck|truck|stuck|puck|fuchsia|fudge|function|funk|punctual|country|county|count|account|discount|country music|scout|"
    "screw|screwdriver|crew|nut|nuts and bolts|ball|balls|bollard|cracker|firecracker|spice|spicy|despicable me|suspicious|auspicious|chinchilla|kinky hair|raccoon|cocoon|tycoon|typhoon|"
    "homogeneous|homework|homonym|spade|ace of spades|gypsum|flame retardant|retire|jerk chicken|jerky|beef jerky|knee-jerk|fool's gold|april fool|sewage|garbage truck|trash can|waste|rubbish bin|"
    "dumbbell|dumbo|dumbfounded|dumb waiter|idiom|idiosyncrasy|moroni|morocco|oxymoron|stupendous|stupor|stupa|lunar|ratio|rate|rating|pirate|pigment|pigeon|guinea pig|snake|python|wormhole|bookworm|worm gear|crook of the arm|"
    "loser's bracket|loose|lost|lose|killer whale|killing time|skill|skillet|kilo|overkill|roadkill|die|dice|dye|died|diet|dead|deadline|deadlock|dead end|death|shot|shoot|bullet point|bomb calorimeter|bath bomb|blast furnace|"
    "execute|execution|terminate|abort|abortion|kill|hit|beat|strike|attack|defend|fire|burn|explode|crash|hang|choke|blow|bang|rape crisis line|murder mystery|suicide hotline|war|weapon|gun|knife|poison|drug|blood|"
    "breast|nipple|thigh|buttock|rectum|anus|anal gland|vagina|vulva|penis|testicle|sperm|semen|orgasm|erection|virgin|pregnant|naked mole rat|nude|sex|sexual|sexy|intercourse|condom|puberty|period|lesbian|gay|hump|humpback|mount|thrust|stroke|bone|"
    "crazy|insane|mad|mad cow disease|sick|sick leave|ugly duckling|ugly fruit|fat|fat content|trans fat|bastard file|bastard cabbage|devil|hell|heaven|damn|god|jesus|christ|satan|demon|daemon|zombie|vampire|beast|monster|witch hazel"
)
WORDS = _words(
    "OK|Yes|No|Thanks|Hello|Hi|Sure|Maybe|Please|Sorry|Goodbye|Done|Great|Fine|Nothing|Everything|Today|Tomorrow|Red|Blue|Green|Apple|Salt|Note|Summary|Introduction|Conclusion|Ingredients|"
    "Instructions|Step|Example|Question|Answer|Title|Name|Address|Email|Phone|Date|Total|Price|Open|Closed|Error|Warning|Info|True|False|None|null|the|a|of|and|or|not|is|it|he|she|they|you|we|I|me|him|her|them|who|what|why|how|"
    "where|when|this|that|these|those|your|my|our|their|people|person|man|child|world|life|love|work|home|water|money|time|day|night|year|head|face|hand|body|mouth|tongue|finger|hole|stick|rod|tool|piece|thing|stuff|guy|dude|kid|baby|"
    "mom|dad|girl|dog|cow|chicken|monkey|ape|donkey|goat|pig|rat|bull|horse|animal|trash|dirt|mud|smell|stink|poo|pee|toilet|fart|vomit|suck|lick|eat|drink|kiss|hug|touch|hold|push|pull|hate|anger|fear|fight|enemy|shut|shut down|up|get|go|out|away|off"
)
FRAGMENTS = _words(
    "as soon as possible|on the other hand|for a while|of the year|and then he left|when you are ready|which is why we waited|because it was late|but not for long|in the middle of the night|if you want to|"
    "so that everyone can see it|who had been there before|what you need to know|and that is all|you are|you are a|you're|are you|he is|she is a|they are|this is|that was|it is a|I am|we were|I hate to say it|I hate mondays|he hates onions|shut the door|shut down the server|"
    "get out of the car|get lost in the woods|go to bed|go home safely|go away for the weekend|what is wrong with my code|what is wrong with the engine|nobody wants to pay more|nobody knows yet|you should know|you can go home now|you do not have to|your mother called|your face is red|"
    "look at this picture|look at me|I want to kill time|I could eat a horse|this is killing me, my back hurts|break a leg|the bastard file was removed|all of them|every one of them|only you can do it|and you know it|your own|of your own|piece of cake|piece of paper|a waste of time|no way|oh no|my god|good god|what the heck|holy cow|"
    "keep it simple, stupid|that was a silly mistake of mine|I felt stupid after the exam|there are no stupid questions|a dumb question maybe, but how do I start?|he called me an honest man|the pig farm|a rat in the kitchen|the snake bit him|the weather is awful|this traffic is crazy|the movie was terrible|the soup tastes bad|I am sick of the rain|it was an ugly building|"
    "that's ridiculously cheap|an insanely good cake|you are killing it|dead tired|I'm dying to see it|a hell of a good time|the damn key is stuck|poor thing|what a pity|what a shame|shame on the weather|don't worry about it|don't be sorry|sucks to wait so long|it sucks that it rains"
)
QUESTIONS = [
    "What is {t}?", "Can you explain {t} to a child?", "How does {t} work?", "Who invented the {thing}?", "Where can I buy a {j} {thing}?", "How do I {v} the {thing}?", "Why is my {thing} so {j}?",
    "What is the weather like in {place}?", "Write a short poem about {t}.", "Give me three facts about {t}.", "Translate 'the {thing} is {j}' into French.", "How far is it from {place} to {place2}?",
    "Summarise the article about {t}.", "What should I cook with {f} and {f2}?", "When was {name} born?", "Tell me a story about a {one} and a {thing}.", "Is {f} healthy?", "How many people live in {place}?",
    "What's the difference between a {thing} and a {thing2}?", "Could you help me {v} my {thing}?", "Recommend a book about {t}.", "How do I say no politely?", "What time does the {thing} open?", "Why do people like {t}?",
    "My {one} is {e}. What can I do?", "How can I learn {t} in a month?", "Write an email to {name} about the {thing}.", "What are the symptoms of {t}?", "Should I {v} the {thing} or {v2} it?", "Does {t} cause {e} people to sleep badly?",
]  # fmt: skip
REPLIES = [
    "Sure! Here is how to {v} the {thing}: {adv}.", "Of course. {T} is a topic that many people ask about.", "I hope you are well.", "I'm sorry to hear that you are {e}.", "I'm sorry, but I can't help with that.", "As an AI, I do not have feelings, but I can help.",
    "Thank you for your question about {t}.", "You're welcome!", "You are welcome, {name}.", "Great question, {name}!", "Let me know if you need anything else.", "It depends on the {thing}.", "First, {v} the {thing}; then {v2} the {thing2} {adv}.",
    "In {place}, the {thing} is {j} and the {thing2} is {j2}.", "{name} and {name2} went to {place} {adv}.", "The {j} {thing} belongs to {name}.", "I think {name} will {v} it {adv}.", "That's a {j} {thing}.", "No problem at all.", "Yes, that is right.",
    "It was nice to meet you, {name}.", "Good morning, {name}!", "Hi {name}, how are you?", "Hello! How can I help you today?", "See you {adv}.", "Happy birthday, {name}!", "I like {f} with {f2}.", "We had {f} and {f2} in {place}.", "You could try to {v} it {adv}.",
    "You should see a doctor if you feel {e}.", "You need a {j} {thing} for that.", "You are right, the {thing} is {j}.", "You can {v} your {thing} {adv}.", "Your {thing} will arrive {adv}.", "You're all set.", "Your {one} must be proud.", "If you are {e}, talk to a {one}.",
    "He {v}s the {thing} because it is {j}.", "She told her {one} to {v} the {thing}.", "They are {e} because the {thing} broke.", "I am {e} today.", "Don't {v} the {thing}, please.", "Please {v} the {thing} {adv}.", "Dear {name}, thank you for the {thing}. Kind regards, {name2}",
    "We regret to inform you that the {thing} is {j}.", "I look forward to your reply.", "Hope this helps!", "lol that was fun", "haha yes, see you later", "omg I love this {thing}", "this {thing} is so {j} haha", "wow, what a {j} {thing}!", "I hate {f} but I love {f2}.", "What a mess, I spilled the {f}.",
]  # fmt: skip
SYSTEM = [
    "You are a {p} assistant.", "You are an assistant.", "You are a {p} and {p2} assistant.", "You are a {p} {k}.", "You are an expert {k}.", "You are a {k} who knows all about {t}.", "You are a chatbot of a library in {place}.",
    "You are an AI assistant. Answer {adv}.", "You are {name}, a {p} {k}.", "Answer in one sentence.", "Answer the question using the passage below.", "Use the context to answer the question.", "Keep your answers short and {p}.",
    "You only answer questions about {t}.", "You answer as a {k} would.", "You are a language model trained to help.", "Your task is to {v} the {thing}.", "Your job is to answer customers.", "If you do not know, say so.", "Do not make things up.",
    "You are helping {name} to {v} the {thing}.", "You can call the tools below.", "You speak like a {k}.", "Think step by step.", "You are a careful translator.", "You will be given a {thing}.", "You must reply in English.",
]  # fmt: skip
NEWS = [
    "The {place} council voted to {v} the {thing} {adv}, officials said.", "Police arrested a man in {place} after a {thing} was stolen.", "The killer was sentenced to life in prison in {place}.", "Two people were killed and five injured when a {thing} hit a {thing2} near {place}.",
    "{name} {name2} scored the winning goal against {place}.", "Shares fell 3.4 percent after the company said it would {v} its {thing}.", "The court heard that the victim had been stabbed {n} times.", "Scientists in {place} found that {t} affects {n} percent of adults.",
    "The war in the region has displaced {n} thousand people.", "A bomb exploded near {place}, killing {n} soldiers.", "The minister denied claims of racism and sexual harassment.", "The actress spoke about her treatment for breast cancer.", "The film tells the story of a {one} during the war.",
    "{G} marched through {place} to demand equal pay.", "The bishop apologised to victims of abuse.", "The suspect, {n}, was charged with murder and rape.", "Doctors warned of {t} as {n} patients died.", "Born in {place} in 19{n}, {name} studied {t}.", "The {j} {thing} was built in 18{n} by {name} {name2}.",
    "In 19{n} the {thing} was moved to {place}.", "The album sold {n} thousand copies in {place}.", "The army attacked at dawn and took {n} prisoners.", "Her novel about {t} won a prize in {place}.", "The bill would ban {t}, critics say.", "Drug dealers were jailed for {n} years.", "A gay couple from {place} adopted twins.",
    "The attacker shouted at the crowd before he was shot dead.", "Lesbian and gay groups welcomed the ruling.", "Muslim leaders condemned the attack.", "The Jewish museum in {place} reopens {adv}.", "Black voters in {place} backed the {one}.", "White smoke rose above {place}.", "The {animal} is found in {place} and eats {f}.",
]  # fmt: skip
ANIMALS = _words(
    "blue tit|great tit|woodcock|booby|ass|wild ass|donkey|sperm whale|killer whale|cockatoo|pig|rat snake|black rat|beaver|shag|mountain goat|chimpanzee|bull|fox|bear|naked mole rat|weasel|tomcat|mosquito|worm"
)
CODE = [
    "def {i}({i2}, {i3}=None):\n    return {i2} * {n}", "for {i} in range({n}):\n    print({i})", "if {i} is None:\n    raise ValueError(\"{i2} must not be empty\")", "import {i}\nfrom {i2} import {i3}", "const {i} = await fetch(`/api/{i2}/${{{i3}}}`);",
    "let {i} = {i2}.map(x => x * {n});", "SELECT {i}, COUNT(*) FROM {i2} WHERE {i3} > {n} GROUP BY {i};", "public static void {i}(String[] {i2}) {{ return; }}", "#include <{i}.h>\nint main(void) {{ return {n}; }}", "kill -9 {n}", "kill the process with `kill {n}`", "git commit -m \"{v} the {thing}\"",
    "sudo apt-get install {i}", "docker run --rm -p {n}:{n} {i}:latest", "curl -X POST https://example.com/{i}/{n}", "while (*p++ = *q++) {{ {i}(); }}", "x = a*b + c**2 - {i}[{n}]", "assert {i} == {i2}", "class {I}(Base):\n    \"\"\"{V} the {thing}.\"\"\"", "# {V} the {thing} {adv}", "// TODO: {v} the {thing}", "fn {i}(x: &str) -> Option<u32> {{ None }}",
    "<div class=\"{i}\"><a href=\"#{i2}\">{V}</a></div>", ".{i} {{ color: #ff{n}; margin: 0 {n}px; }}", "echo $HOME/$USER > /dev/null 2>&1", "export {i}=$PATH:/usr/{i2}", "try {{ {i}() }} catch (e) {{ abort({n}) }}", "x, y, z = 1, 2, 3", "a = b = c = d = 0", "i, j, k = {i}", "{i}.{i2}().{i3}({n})", "if not {i}: die(\"cannot {v} {thing}\")", "the parent process must reap its zombie children", "the master sends jobs to the slave nodes",
    "[tool.{i}]\n{i2} = {n}\n{i3} = true", "- name: {v} {thing}\n  run: make {i}", "return {i} if {i2} else {i3}", "self.{i} = {i2} or {n}", "console.log('{i}', {i2});", "printf(\"%d %s\\n\", {i}, {i2});",
]  # fmt: skip
FORMS: list[Callable[[random.Random], str]] = [
    lambda r: "{" + ", ".join(f'"{r.choice(IDENTIFIERS)}": {r.choice([str(r.randint(0, 999)), chr(34) + r.choice(NAMES) + chr(34), "true", "null", "[]"])}' for _ in range(r.randint(1, 5))) + "}",
    lambda r: f"2024-0{r.randint(1, 9)}-1{r.randint(0, 9)} 1{r.randint(0, 9)}:0{r.randint(0, 9)}:11,{r.randint(100, 999)} {r.choice(['INFO', 'WARN', 'ERROR', 'DEBUG'])} {r.choice(IDENTIFIERS)}: {r.choice(VERBS)} {r.choice(THINGS)} failed after {r.randint(1, 99)} ms",
    lambda r: "| " + " | ".join(r.choice(THINGS + FOOD + NAMES) for _ in range(r.randint(2, 4))) + " |\n|---|---|---|\n| " + " | ".join(str(r.randint(1, 999)) for _ in range(3)) + " |",
    lambda r: "# " + r.choice(TOPICS).title(),
    lambda r: "## " + r.choice(THINGS).title() + " and " + r.choice(THINGS),
    lambda r: "**" + r.choice(WORDS + THINGS).title() + ":**",
    lambda r: f"* {r.randint(1, 9)} cups {r.choice(FOOD)}",
    lambda r: "\n".join(f"{r.choice('*-+')} {r.choice(FOOD + THINGS).capitalize()}" for _ in range(r.randint(1, 6))),
    lambda r: "\n".join(f"{n + 1}. **{r.choice(VERBS).capitalize()}** the {r.choice(THINGS)} {r.choice(ADVERBS)}." for n in range(r.randint(1, 4))),
    lambda r: f"> *{r.choice(FRAGMENTS)}*",
    lambda r: f"- [x] {r.choice(VERBS)} the {r.choice(THINGS)}",
    lambda r: f"- **{r.choice(THINGS).title()}**: {r.choice(ADJECTIVES)} and {r.choice(ADJECTIVES)}, for {r.choice(THINGS)}s.",
    lambda r: f"[{r.choice(THINGS)}](https://example.org/{r.choice(IDENTIFIERS)}) 🎉",
    lambda r: f"{r.choice(NAMES)} {r.choice(NAMES)}",
    lambda r: f"{r.choice(NAMES)}, {r.choice(NAMES)} and {r.choice(NAMES)}",
    lambda r: ", ".join(r.sample(THINGS + FOOD + ADJECTIVES, r.randint(2, 6))),
    lambda r: f"${r.randint(1, 999)}.99 per {r.choice(THINGS)}, {r.randint(1, 99)}% off",
    lambda r: f"{r.randint(1, 99)} + {r.randint(1, 99)} = {r.randint(2, 198)}",
    lambda r: f"Day {r.randint(1, 9)}: {r.choice(PLACES)}",
    lambda r: f"{r.choice(THINGS)} {r.choice(ADJECTIVES)} {r.choice(VERBS)}",
    lambda r: f"the {r.choice(ADJECTIVES)} {r.choice(THINGS)} of {r.choice(NAMES)}",
    lambda r: f"Total: {r.randint(1, 9999)} {r.choice(THINGS)}s ({r.choice(ADJECTIVES)})",
]  # fmt: skip
_SLOT = re.compile(
    r"\{(one|ident|g2|g|G|k2|k|p2|p|e|s2|s|a2|a|T|t|thing2|thing|v2|v|V|j2|j|place2|place|name2|name|f2|f|adv|n|i2|i3|i|I|animal)\}"
)
_LISTS = {
    "one": ONES, "ident": IDENTITY_WORDS, "g": GROUPS, "k": KINDS, "p": POLITE, "e": EMOTIONS, "s": SINGLE_INSULTS, "a": RUDE_ADJECTIVES, "t": TOPICS, "thing": THINGS,
    "v": VERBS, "j": ADJECTIVES, "place": PLACES, "name": NAMES, "f": FOOD, "adv": ADVERBS, "i": IDENTIFIERS, "animal": ANIMALS,
}  # fmt: skip


def _filled(template: str, rng: random.Random) -> str:
    def one(match: re.Match[str]) -> str:
        slot = match[1]
        if slot == "n":
            return str(rng.randint(2, 99))
        if slot in "GTVI":
            return rng.choice(_LISTS[slot.lower()]).capitalize()
        return rng.choice(_LISTS[slot.rstrip("23")])

    return _SLOT.sub(one, template).replace("{{", "{").replace("}}", "}")


def clean_texts(count: int, seed: int) -> list[str]:
    """That many harmless texts: chat, questions, news, code, Markdown, tables, lists, names, words and fragments."""
    rng = random.Random(seed)
    whole = [
        *INNOCENT_WORDS,
        *WORDS,
        *FRAGMENTS,
        *IDENTITY_WORDS,
        *IDENTITY_WORDS,
        *GROUPS,
        *ONES,
        *NAMES,
        *FOOD,
        *THINGS,
        *TOPICS,
    ]
    texts: list[str] = []
    while len(texts) < count:
        kind = rng.random()
        if kind < 0.2:
            text = rng.choice(whole)
            text = rng.choice(
                (
                    text,
                    text,
                    text.capitalize(),
                    text + ".",
                    text.title(),
                    f"the {text}",
                    f"{text} and {rng.choice(whole)}",
                )
            )
        elif kind < 0.75:
            text = _filled(rng.choice(rng.choice((QUESTIONS, REPLIES, NEWS, KIND, CODE, SYSTEM))), rng)
        else:
            text = rng.choice(FORMS)(rng)
        if rng.random() < 0.15:
            text += rng.choice((" ", "\n")) + _filled(rng.choice(REPLIES + NEWS), rng)
        texts.append(text)
    return texts


def contrasts(count: int, seed: int) -> tuple[list[str], list[str]]:
    """Mild insults, and as many kind or neutral texts of the same people in the same forms."""
    rng = random.Random(seed)
    rude = [_filled(rng.choice(RUDE), rng) for _ in range(count)]
    kind = [_filled(rng.choice(KIND), rng) for _ in range(count)]
    return [_articles(text) for text in rude], [_articles(text) for text in kind]


def salads(words: list[str], count: int, seed: int) -> list[str]:
    """Ordinary words thrown together: none of them is to score high beside others, "you" and "your" included."""
    rng = random.Random(seed)
    small = (
        "you your you're is are the a an he she they his her and or to of in my me it that this not be all who what so"
    )
    often = small.split()
    return [
        " ".join(rng.choice(words) if rng.random() < 0.6 else rng.choice(often) for _ in range(rng.randint(3, 10)))
        for _ in range(count)
    ]


def _articles(text: str) -> str:
    return re.sub(r"\b([Aa]) (?=[aeiouAEIOU])", r"\1n ", text)
