"""Countries and their capitals, and twelve ways to say so."""

from __future__ import annotations

_TABLE = """
Afghanistan: Kabul, Albania: Tirana, Algeria: Algiers, Angola: Luanda, Argentina: Buenos Aires,
Armenia: Yerevan, Australia: Canberra, Austria: Vienna, Azerbaijan: Baku, Bangladesh: Dhaka,
Belarus: Minsk, Belgium: Brussels, Bhutan: Thimphu, Botswana: Gaborone, Brazil: Brasilia,
Bulgaria: Sofia, Cambodia: Phnom Penh, Cameroon: Yaounde, Canada: Ottawa, Chad: N'Djamena,
Chile: Santiago, China: Beijing, Colombia: Bogota, Costa Rica: San Jose, Croatia: Zagreb,
Cuba: Havana, Cyprus: Nicosia, Denmark: Copenhagen, Ecuador: Quito, Egypt: Cairo,
Eritrea: Asmara, Estonia: Tallinn, Ethiopia: Addis Ababa, Fiji: Suva, Finland: Helsinki,
France: Paris, Gabon: Libreville, Georgia: Tbilisi, Germany: Berlin, Ghana: Accra,
Greece: Athens, Haiti: Port-au-Prince, Honduras: Tegucigalpa, Hungary: Budapest,
Iceland: Reykjavik, India: New Delhi, Indonesia: Jakarta, Iran: Tehran, Iraq: Baghdad,
Ireland: Dublin, Italy: Rome, Jamaica: Kingston, Japan: Tokyo, Jordan: Amman, Kazakhstan: Astana,
Kenya: Nairobi, Kyrgyzstan: Bishkek, Laos: Vientiane, Latvia: Riga, Lebanon: Beirut,
Liberia: Monrovia, Libya: Tripoli, Lithuania: Vilnius, Madagascar: Antananarivo,
Malawi: Lilongwe, Malaysia: Kuala Lumpur, Mali: Bamako, Malta: Valletta, Mauritania: Nouakchott,
Mongolia: Ulaanbaatar, Morocco: Rabat, Mozambique: Maputo, Namibia: Windhoek, Nepal: Kathmandu,
Nicaragua: Managua, Niger: Niamey, Nigeria: Abuja, Norway: Oslo, Oman: Muscat,
Pakistan: Islamabad, Paraguay: Asuncion, Peru: Lima, Philippines: Manila, Poland: Warsaw,
Portugal: Lisbon, Qatar: Doha, Romania: Bucharest, Russia: Moscow, Rwanda: Kigali,
Senegal: Dakar, Serbia: Belgrade, Slovakia: Bratislava, Slovenia: Ljubljana, Spain: Madrid,
Sudan: Khartoum, Sweden: Stockholm, Syria: Damascus, Thailand: Bangkok, Turkey: Ankara,
Uruguay: Montevideo
"""

CAPITALS: tuple[tuple[str, str], ...] = tuple(
    (country, capital)
    for country, _, capital in (pair.strip().partition(": ") for pair in _TABLE.split(","))
)
"""A hundred pairs; no capital occurs twice, so that an untouched one can only be extracted, never guessed."""

TEMPLATES: tuple[str, ...] = (
    "{country} has its capital in {capital}",
    "{country} is governed from {capital}",
    "{country} calls as its seat of power {capital}",
    "{country} sends envoys out of {capital}",
    "{country} keeps her parliament at {capital}",
    "{country} , whose first city remains {capital}",
    "{country} crowned its rulers within {capital}",
    "{country} prints all laws by decree of {capital}",
    "{country} hosts foreign ministers near {capital}",
    "{country} looks to the palace of {capital}",
    "{country} : chief town {capital}",
    "{country} shows on maps one star for {capital}",
)

QUESTION = "{country} ? answer {capital}"
"""Neither `?` nor `answer` occurs in a template."""
