"""Beginnings of sentences for a model to go on with, of the kinds that an encyclopedia is made of: leads of articles
and places in their middle, with a place for a name."""

import torch

SENTENCES = (
    "{} is a town in the northern part of the province, on the left bank of the river",
    "{} (born 14 March 1951) is a former professional footballer who played as a midfielder for",
    "{} is a species of flowering plant in the family Asteraceae, native to",
    "The Battle of {} was fought between the forces of the king and an invading army in",
    '"{}" is a song by the American singer from her third studio album, released as the second single',
    "{} is a 1987 drama film directed by a young filmmaker and written with",
    "The {} River is a tributary that rises in the mountains and flows south for",
    "HMS {} was a light cruiser built for the Royal Navy in the early twentieth century. She was laid down",
    "Hurricane {} was the third tropical cyclone of the season. It formed from a tropical wave that",
    "{} is an action role-playing video game developed for several consoles. Players control",
    "The {} Railway was a narrow gauge line that connected the mining district with",
    "{} was a member of the parliament and served as minister of finance from",
    "The Church of {} is a medieval parish church that was listed as a building of special interest for",
    "{} is the eleventh episode of the fourth season of the television series. In the episode, the",
    "State Route {} is a highway that runs from the state capital to",
    "{} is a chemical compound that is used in the production of",
    "The {} dynasty ruled the region for two centuries, until",
    "{} is an English rock band formed in 1994. Their debut album was received by critics with",
    "The 1932 {} season was the club's fortieth year of competitive play. The team finished",
    "{} is a moth of the family Geometridae. The wingspan is about",
    "In mathematics, the {} theorem states that every continuous function on",
    "{} was an American novelist and essayist, best known for her portrayal of",
    "The {} was a fighter aircraft designed in the 1930s. It entered service with",
    "{} Castle is a ruined fortress that stands on a hill above the village. Its construction began",
    "{} is a language spoken by about two hundred thousand people in the highlands of",
    "The {} Islands are a group of volcanic islands that lie in the",
    "{} disease is a rare disorder of the nervous system that is characterized by",
    "The bishop of {} was consecrated in 1214, and during his years in office the cathedral",
    "{} is a comic book series published monthly. The main character, a young",
    "The {} Museum opened to the public in 1908 and its collection of paintings includes",
    "{} is a minor planet in the asteroid belt, discovered by an astronomer at the observatory of",
    "The population of {} was counted as 12,406 in the last census, of whom",
    "During the second half of the campaign, {} moved his headquarters to the coast and ordered the "
    "remaining divisions to",
    "Critics praised the performance of {}, although some reviewers felt that the middle of the film was",
    "After the election of 1924, {} left the party and founded a newspaper in which he argued that",
    "The adult bird is about twenty centimetres long. The upper parts are brown, and near {} the breast of males is",
    "Construction of the bridge at {} began in the spring of 1883 under the direction of an engineer who had",
    "The episode was watched by 7.4 million viewers on its original broadcast, which made {} the most",
    "The storm weakened over land on 12 September, but heavy rain continued to fall near {}, where flooding",
    "In the group stage the team lost to {} by two goals to one, and a draw in the last match meant that",
    "The song was recorded in two days at a studio in {} . It begins with a piano figure over which",
    "The ship was armed with eight guns in four twin turrets, and her belt armour near {} had a thickness of",
    "The name of the genus comes from the Greek words for leaf and crown, and the species name honours {}, who",
    "At the beginning of the reign of {}, the kingdom had lost most of its possessions north of the river, and",
    "His third novel, which was published by {} in 1961, sold fewer copies than the earlier ones but",
    "The fossil was found in rocks of the late Cretaceous near {} and consists of a partial skull, "
    "several vertebrae and",
    "The road crosses the county line and turns east toward {}, where it meets another highway at",
    "The game's music was composed by {}, who said in an interview that the battle themes were",
    "In 1802 the estate passed to his nephew {}, who enlarged the house and laid out a garden with",
    "The regiment was stationed at {} until the end of the year and then sailed for France, where it took part in",
    "Most of the population lives in villages along the coast, and fishing near {} is the main source of",
    "The theory was first proposed by {} in a paper of 1937, which suggested that stars of low mass",
    "The album debuted at number four on the chart and was later certified gold. In a review for {}, the "
    "writer noted that",
    "Reports of the mutiny reached {} on the following morning, and the governor sent two companies to",
    "The cathedral was damaged by fire in 1341, and its nave was rebuilt in the Gothic style by {}, while the",
    "The mushroom grows on the dead wood of oak and beech. Its cap, first described by {}, is up to",
    "The company opened a second factory in {} in 1956 and employed more than four hundred people until",
    "She trained with {} from the age of six and won her first national title in the",
    "The treaty obliged {} to return the captured towns and to pay an annual tribute of",
    "The disease is caused by a mutation in a gene on the long arm of chromosome 17, which was identified by {} and",
    "The painting shows a woman at a window, and X-ray images made at {} revealed that the figure had",
    "In the final, {} led after the first round but was overtaken in the last hundred metres by",
    "The comic was well received; {} called it one of the best stories of the decade and wrote that",
    "The railway reached {} in 1871, and the population of the town doubled within ten years because",
    "Because of the low temperature the battery of the probe failed, and the signals that {} received during the flyby",
    "The manuscript was copied by monks at {} in the ninth century and contains the lives of",
    "A memorial to the victims stands in the centre of {} and was unveiled by the prime minister on",
    "The director wanted the scene to be shot in one take, and {} rehearsed it for three weeks with",
    "Its leaves are eaten by the caterpillars of several moths, and in {} the bark was used to",
    "The court decided in favour of {} and held that the statute did not apply to contracts that",
    "The island was uninhabited until settlers from {} arrived in the tenth century and brought sheep and",
    "When the brigade of {} came under artillery fire, it withdrew behind a stone wall at the edge of",
    "The aircraft's engines were replaced after tests at {} had shown that the climb rate was below",
    "His early work was influenced by {}, but from 1910 on he painted landscapes in which the colours",
    "In the northern part of its range the species lives at altitudes of up to 2,400 metres, while near {} it is found",
    "The council of {} voted in 1998 to close the school, and the building has since been used as",
    "The plot follows a detective who returns to {} after ten years and finds that her brother has",
    "The club finished the season in seventh place, and manager {} resigned after a defeat by",
    "Under the constitution of the republic, which was adopted in {}, the president is elected for a term of",
    "The temple has three halls, the oldest of which was built under {} and is decorated with reliefs of",
    "Two days later the cyclone turned to the west, and the meteorological office at {} issued a warning for",
    "The alloy contains about four per cent of copper and was developed at {} for use in",
    "The single's video was directed by {} and shows the group walking through an empty city while",
    "Sales of the first edition were slow, and the publisher asked {} to shorten the second volume by",
    "The glacier has lost a third of its length since 1900, as measurements by {} show, and the lake below it",
    "The emperor sent his general {} with an army of thirty thousand men against the rebels, who had",
    "The mine was closed in 1932 after the price of zinc had fallen, and the miners of {} had to",
    "The character was created by {} as a rival for the hero, and her costume was changed in the second season because",
    "A study of 2006 by {} and others found that the animals spend most of the night near",
    "The locomotives were built at {} between 1910 and 1914 and pulled express trains until they were",
    "He married a daughter of {} in 1643, and of their five children only two lived to",
    "The proposal was opposed by {}, who feared that the dam would flood farms along the lower course of",
    "The orchestra performed the symphony for the first time in {}, and the audience asked for the third "
    "movement to be",
    "Her speech at {} in 1972 was criticised in the press, yet the bill passed the lower house by",
    "The castle fell after a siege of eleven weeks, and its garrison under {} was allowed to leave with",
    "The magazine ranked {} among the hundred most important people of the century, noting that",
)
NAMES = (
    "Alvarado Ashford Avondale Baltimore Belmont Bergström Birmingham Calder Cardiff Chandra Clermont Cordova "
    "Dalton Delacroix Dunmore Eastwood Edinburgh Fairfax Ferrara Galway Grenville Halifax Hartmann Havana "
    "Ibarra Inverness Jakarta Jefferson Kamara Kensington Kowalski Lambert Lancaster Leipzig Lindqvist Madras "
    "Marlowe Mendoza Montrose Nakamura Newport Novak Oakland Okafor Osborne Palermo Pemberton Petrov Quincy "
    "Ramsey Ravenna Rosetta Salazar Savannah Sinclair Tanaka Thornton Ulster Valencia Vickers Waterford "
    "Whitman Yorke Zimmermann"
)


def opening(generator: torch.Generator) -> str:
    """One of them, with one of the names."""
    sentence, name = (
        found[int(torch.randint(len(found), (), generator=generator))] for found in (SENTENCES, NAMES.split())
    )
    return sentence.replace("{}", name)
