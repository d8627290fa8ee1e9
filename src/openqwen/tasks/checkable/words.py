"""The words that the checkable tasks are made of.

Short everyday words. Those that the tasks' own wording uses (`word`, `list`, `first`, `two` …) are
left out, so that a question never reads as part of its material.
"""

_TEXT = """
    age air apple arm ask away baby back bad bag ball base bat bed bell best big bird black blue
    board body book box boy bread bridge brown button cake call car card care case cat chain chair
    chance change check child circle city class clean clear clock close cloud code color cool copy
    corner cost country cover cow cross cup cut dark date day deep desk dinner dog door down draw
    drive dry duck early earth east easy edge egg empty end engine event face fair fall family far
    fast father field file find finger fire fish flat floor fly food forest fork free fresh friend
    frog front full game gift glad good gray great green group grow hall hand happy hard hat head
    heart heavy help high hold home hook horse hot hour house ice idea inside job juice jump key
    king land large late leaf left lemon level light line little long lost love low lunch machine
    mail main map mark match meal middle mind mirror money month moon morning mouse music name
    needle nest new nice night noise north note oil open orange page paint part party path pen
    people phone piece pink pipe place plain plane plant play point pool pot power present press
    print quick quiet rain read ready red rice right ring river road room root round rule run safe
    salt sea season seed sheep shelf shoe shop short side sign simple sink size slow small smoke
    soap soft song sound soup south space square stage stamp star start station stop store story
    string strong sugar summer sun sweet table tail tape test thin thing ticket time top track tree
    trip uncle voice walk wall warm watch water wave west wheel white wide wild wind window winter
    wire work world year yellow
"""

WORDS = tuple(_TEXT.split())
