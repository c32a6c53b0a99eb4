"""Short passages in many registers, written for this project: general text for calibration and for held-out checks."""

PASSAGES = (
    "The ferry left the northern pier at seven, as it did every morning except Sunday. Most of the passengers knew "
    "one another by sight and nodded before they opened their newspapers. Only the boy with the violin case stood "
    "at the rail, counting the gulls and losing count whenever the boat rolled.",
    "To change the filter, switch the pump off and wait until the gauge shows zero. Turn the housing a quarter "
    "turn to the left and lift it out. Rinse the sieve under running water, check the rubber ring for cracks, and "
    "put everything back in the opposite order. Never use grease on the thread.",
    "def moving_average(values, width):\n"
    "    total = sum(values[:width])\n"
    "    averages = [total / width]\n"
    "    for old, new in zip(values, values[width:]):\n"
    "        total += new - old\n"
    "        averages.append(total / width)\n"
    "    return averages\n",
    "Dear Ms Okafor,\n\n"
    "thank you for your message of 3 March. I am sorry that the parcel arrived damaged. A replacement will leave "
    "our warehouse tomorrow and should reach you within four working days. You need not send the broken cup back; "
    "a photograph is enough for our records.\n\n"
    "Kind regards\n"
    "Paul Lindqvist",
    "Q: Why does bread go stale faster in the refrigerator than on the counter?\n"
    "A: Because the starch in it crystallises most quickly just above freezing. In the freezer the same process "
    "nearly stops, so bread keeps well there and can be toasted from frozen.",
    "The committee considered three proposals. The first would widen the road at a cost of 2.4 million; the second "
    "would build a separate path for bicycles; the third would do nothing for two years and measure the traffic. "
    "After a long debate, the second was adopted by nine votes to four, with one abstention.",
    "Light travels about 300,000 kilometres in one second, so the light we see from the Sun is a little over eight "
    "minutes old. From the nearest other star it is more than four years old. Looking far away is therefore always "
    "looking back, and a telescope is in some sense a machine for reading history.",
    "- two onions, finely chopped\n"
    "- 400 g of lentils, washed\n"
    "- one litre of stock\n"
    "- a spoonful of cumin\n\n"
    "Fry the onions slowly until they are golden. Add the cumin, stir for a minute, then the lentils and the "
    "stock. Simmer for half an hour and season at the very end, because salt makes lentils tough.",
    "'You said you would call,' she said.\n"
    "'I did call. Nobody answered.'\n"
    "'At what time?'\n"
    "'About ten, maybe later.'\n"
    "She looked at the clock as though it might take her side. 'At ten,' she said, 'I was standing next to the "
    "telephone, wondering why it did not ring.'",
    '{"name": "north-station", "sensors": [{"id": 17, "unit": "celsius", "value": -3.5}, {"id": 18, "unit": '
    '"percent", "value": 81}], "healthy": true, "checked": "2021-11-04T06:30:00Z", "comment": null}',
    "A triangle with sides 3, 4 and 5 has a right angle, because 9 plus 16 is 25. Ropes with twelve equal knots "
    "were used to lay out square corners long before anyone wrote down a proof. If one side is doubled and the "
    "angle kept, the area doubles as well; if all sides are doubled, it grows fourfold.",
    "The museum is open from Tuesday to Saturday, 10 a.m. to 6 p.m. Tickets cost 9 euros; children under twelve "
    "and teachers with a class enter free of charge. Photography without flash is allowed everywhere except in "
    "room 14. The lift to the roof terrace closes at five.",
    "It had rained for eleven days. The river was brown and quick, and it carried branches, a garden chair, and "
    "once a whole wooden door with its number still on it. People came down to the bridge in the evening to look, "
    "and said little, and went home to move their carpets upstairs.",
    "SELECT city, COUNT(*) AS orders, SUM(total) AS revenue\n"
    "FROM orders\n"
    "JOIN customers ON customers.id = orders.customer_id\n"
    "WHERE ordered_at >= '2020-01-01' AND cancelled = FALSE\n"
    "GROUP BY city\n"
    "HAVING COUNT(*) > 10\n"
    "ORDER BY revenue DESC;",
    "Translate into French: Where is the railway station? -> Où est la gare ? Translate into German: The book lies "
    "on the table. -> Das Buch liegt auf dem Tisch. Translate into Spanish: We are going to arrive late. -> Vamos "
    "a llegar tarde.",
    "Honey bees tell each other where food is by dancing. The direction of the dance, measured against gravity on "
    "the upright comb, stands for the direction of the flight, measured against the sun. The longer the bee "
    "shakes, the farther the flowers are. Observers who learn the code can find the meadow themselves.",
    "I bought these boots in autumn and have worn them nearly every day since. They were stiff for the first week, "
    "but they have never let water in. The laces broke after two months, which is annoying at this price. Four "
    "stars out of five; I would buy them again, half a size larger.",
    "Chapter Two\n\n"
    "Of how the clockmaker lost his key\n\n"
    "Now the clockmaker of that town was a careful man, and he had never in thirty years gone to bed without "
    "winding the great clock in the tower. So when he put his hand in his coat that evening and found nothing "
    "there but a hole, he sat down on the stairs and laughed.",
    "The patient, a man of 54, reported tiredness and a dry cough for three weeks. Temperature and blood pressure "
    "were normal. An X-ray of the chest showed no change from the year before. He was advised to rest, to drink "
    "enough, and to come back in ten days if the cough had not improved.",
    "In chess, the rook moves along ranks and files, the bishop along diagonals, and the queen along both. The "
    "knight alone may jump over other pieces. A pawn that reaches the last rank is exchanged for any piece but a "
    "king, and almost everyone chooses a queen.",
    "$ tar -czf backup.tar.gz notes/ photos/2019\n"
    "$ ls -lh backup.tar.gz\n"
    "-rw-r--r-- 1 anna users 1.3G May 12 09:41 backup.tar.gz\n"
    "$ sha256sum backup.tar.gz > backup.sha256\n"
    "$ echo done\n"
    "done\n",
    "Prices rose by 2.1 percent last year, mainly because energy and rents became more expensive. Food was "
    "slightly cheaper than in the year before. Economists expect the rate to fall below two percent by the summer, "
    "provided that wages do not grow faster than in the past three years.",
    "Once there was a fox who wanted to be a gardener. Every night he dug up the roses and planted them again a "
    "little further to the left. 'They must like it,' he said, 'for they have not complained.' In spring, when "
    "nothing bloomed, he decided that roses were simply ungrateful.",
    "Good evening. The storm that reached the coast this afternoon will move inland overnight. Expect gusts of up "
    "to 90 kilometres an hour in the hills and heavy rain in the west. Tomorrow will be calmer, with sunshine from "
    "noon and temperatures around fourteen degrees.",
)
"""Passages of 40 to 80 words."""
