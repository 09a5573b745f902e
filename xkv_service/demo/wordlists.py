"""The words that names, values and keys are composed of.

Every name in a document is a combination drawn from these lists (or an invented word, see
``names.py``), so that a fact can only be answered by finding it in the document.
"""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


CITIES = _words(
    """
    Lisbon Porto Madrid Seville Valencia Bilbao Paris Lyon Nantes Lille Marseille Toulouse Bordeaux
    Geneva Zurich Basel Bern Vienna Graz Salzburg Linz Munich Berlin Hamburg Cologne Dresden Leipzig
    Bremen Prague Brno Warsaw Krakow Gdansk Poznan Vilnius Riga Tallinn Helsinki Turku Tampere
    Stockholm Uppsala Malmo Oslo Bergen Trondheim Copenhagen Aarhus Odense Reykjavik Dublin Cork
    Galway Belfast Glasgow Edinburgh Leeds Bristol York Cardiff Swansea London Oxford Cambridge
    Norwich Antwerp Ghent Bruges Brussels Utrecht Rotterdam Delft Leiden Rome Milan Turin Naples
    Bologna Verona Palermo Athens Patras Sofia Varna Bucharest Cluj Belgrade Zagreb Split Ljubljana
    Budapest Debrecen Istanbul Ankara Izmir Cairo Tunis Rabat Dakar Accra Lagos Nairobi Kampala
    Durban Pretoria Windhoek Lusaka Harare Delhi Mumbai Chennai Kolkata Jaipur Colombo Dhaka
    Kathmandu Bangkok Hanoi Hue Manila Cebu Jakarta Bandung Singapore Penang Taipei Seoul Busan
    Osaka Kyoto Nagoya Sapporo Tokyo Sydney Perth Brisbane Adelaide Hobart Auckland Wellington
    Dunedin Vancouver Calgary Toronto Ottawa Montreal Quebec Halifax Boston Albany Denver Dallas
    Houston Austin Phoenix Seattle Portland Oakland Chicago Detroit Atlanta Miami Havana Kingston
    Bogota Quito Lima Cusco Santiago Mendoza Rosario Montevideo Recife Salvador Curitiba
    """
)

FIRST_NAMES = _words(
    """
    Maria Ana Joana Ines Sofia Clara Elena Lucia Carmen Paula Julia Emma Alice Louise Camille Chloe
    Nina Eva Hannah Greta Ingrid Astrid Freya Sigrid Karin Helga Marta Agata Zofia Irena Petra Jana
    Vera Olga Irina Tanya Leila Amira Fatima Yasmin Noor Zara Aisha Ama Abena Wanjiru Thandi Naledi
    Priya Anita Meera Lakshmi Sunita Mei Lin Yuki Hana Aiko Keiko Sora Minji Jisoo Rosa Ruth Sarah
    Rachel Naomi Esther Grace Hope Ivy Hazel Joao Pedro Tiago Rui Nuno Carlos Diego Pablo Luis Mateo
    Hugo Louis Jules Paul Karl Otto Felix Jonas Lukas Erik Lars Nils Sven Olaf Bjorn Jan Piotr Marek
    Tomas Pavel Ivan Dmitri Sergei Andrei Omar Karim Hassan Tariq Samir Yusuf Kofi Kwame Juma Sipho
    Themba Arjun Ravi Vikram Anil Rajesh Wei Jun Kenji Hiro Takeshi Daichi Minho Daniel Samuel David
    Adam Simon Peter Thomas Martin Victor Oscar Arthur Edward Henry George Walter Frank Robert Colin
    Duncan
    """
)

LAST_NAMES = _words(
    """
    Alves Pereira Sousa Costa Ramos Lopes Garcia Torres Vega Molina Castro Ortega Moreau Lambert
    Girard Faure Mercier Dubois Keller Brandt Vogel Huber Bauer Winkler Schuster Lang Berger Novak
    Dvorak Svoboda Kowalski Nowak Wrobel Mazur Zielinski Petrov Ivanov Sokolov Orlov Volkov Lindgren
    Holm Berg Dahl Strand Hansen Larsen Nygaard Virtanen Korhonen Laine Rossi Bianchi Ferrari Conti
    Greco Marino Papadakis Nikolaidis Yilmaz Demir Kaya Aydin Haddad Khoury Nasser Mansour Farah
    Mensah Owusu Boateng Okafor Adeyemi Kamau Otieno Dlamini Nkosi Sharma Patel Gupta Reddy Iyer
    Nair Bose Perera Silva Tanaka Sato Suzuki Mori Kimura Kato Park Choi Jung Chen Wang Zhou Huang
    Nguyen Tran Pham Santos Reyes Cruz Walsh Byrne Doyle Murphy Fraser Campbell Stewart Morgan Evans
    Hughes Carter Fletcher Mason Turner Shepherd Whitfield Ashworth Bennett Chandler Draper Ellison
    Fairfax Goodwin Hartley Ingram
    """
)

ADJECTIVES = _words(
    """
    amber azure bold brave bright broken calm careful clever cold copper coral crimson curious dark
    deep distant eager early emerald faded fierce frozen gentle ghostly gilded golden grand green
    grey hidden hollow honest humble icy idle indigo iron ivory jolly keen kind late lean light
    lively lonely loud lucky marble mellow merry misty modest narrow neat noble olive open orange
    pale patient pearl plain polished proud purple quick quiet rapid red restless ripe rough round
    royal ruby rustic sandy scarlet secret serene sharp shy silent silver simple sleepy slow small
    smooth soft solemn solid spare steady still stormy sturdy subtle sunny swift tall tame tender
    thin tidy tiny tranquil velvet violet vivid warm wary white wide wild windy wise witty wooden
    yellow young
    """
)

NOUNS = _words(
    """
    acorn anchor anvil apple arrow badger barrel basket beacon bear beaver bell birch bison blossom
    boat bridge brook bucket canyon castle cedar cello chestnut clock cloud clover comet compass
    cottage crane crow crown dolphin dove dragon drum eagle ember falcon feather fern ferry finch
    flute forest fountain fox garden gate glacier goose grove gull hammer harbor harp hawk hazel
    hedgehog heron hill horse island ivy jackal jaguar kettle kite ladder lake lamp lantern lark
    leaf lemon leopard lily lion lizard lotus lynx magpie maple marsh meadow mill mirror moon moose
    mountain needle nettle oak oasis ocean orchard orchid otter owl panda parrot pebble pelican
    pepper pine planet plum pond poplar prairie puffin quarry quartz rabbit raven reef ribbon river
    robin rocket rose saddle sail salmon seal shell shore signal sparrow spruce squirrel star stone
    stork summit swan temple thistle thunder tiger torch tower trail tulip turtle valley violin
    walnut walrus wave well whale willow window wolf wren zebra
    """
)

SITES = _words(
    """
    office warehouse clinic depot library museum laboratory workshop archive station bakery school
    theatre harbour reception canteen studio garage greenhouse bookshop
    """
)

DEPARTMENTS = _words(
    """
    finance legal purchasing logistics marketing research payroll security quality training catering
    maintenance design export insurance planning publishing support testing travel treasury press
    software hardware customs
    """
)

MONTHS = _words(
    """
    January February March April May June July August September October November December
    """
)

WEEKDAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")

SYLLABLE_ONSETS = _words("b br c ch d dr f fl g gr h j k kl l m n p pr qu r s sh st t th tr v w y z")

SYLLABLE_VOWELS = _words("a e i o u ai ea ia io oa ou")

SYLLABLE_CODAS = ("l", "m", "n", "nd", "r", "rk", "s", "st", "t", "th", "x", "", "", "", "")

ORDINALS = _words("first second third fourth fifth sixth")
COUNTS = _words("no one two three four five six")
