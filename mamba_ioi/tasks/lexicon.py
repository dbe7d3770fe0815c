"""Common English words of four letters or more, which most tokenizers have as one token after a space."""

from __future__ import annotations

_TEXT = """
able account acid action active actor address advance adventure advice afternoon agent agreement airport alarm album
alone amount anchor ancient angle animal answer apple area arena army arrow article artist aspect atom attack aunt
author autumn award baby back bacon ball balloon band bank barrel base basket bath battery battle beach beam bean bear
beard beauty beef beer bell belt bench bike bird birth black blade blanket block blood blue board boat body bomb bone
book boot border boss bottle bottom bowl brain branch brass brave bread breakfast breath brick bridge brief bright
brother brown brush bucket budget building bullet butter button cabin cable cake camera camp canal candle candy
captain carbon card career cargo carpet carrot castle cattle cave ceiling cell center chain chair chalk chamber
champion chance channel chapter charm chart cheap cheese chef chest chicken chief child chip choice church circle
citizen city claim class clay clean clear clerk cliff climate clock cloth cloud club coach coal coast coat code coffee
coin cold collar college colony color column comedy comfort common copper copy corn corner cotton couch council
country couple courage course court cousin cover crack craft cream credit crew crime crisis crop cross crowd crown
cruise crystal culture curtain curve custom cycle daily damage dance danger dark daughter dawn dead dealer debt decade
deck deep deer degree delay demand dental depth desert design desk detail device diamond diet dinner dirt dish disk
distance doctor dollar domain door double draft dragon drama dream dress drink driver drum dust duty eagle early earth
east easy echo edge editor effort eight election elephant empire empty energy engine engineer entry error essay
evening event evil exam example exit expert fabric face factor factory faith fall family famous farm farmer fashion
fast fate father feather fence festival fever fiction field fifty fight figure file film final finger fire fish flag
flame flash flat fleet flesh flight floor flower fluid foam focus folk food foot force forest fork form fortune forum
frame fresh friend front fruit fuel full function fund funny future galaxy game garage garden gate gentle ghost giant
gift girl glass globe glory glove goal gold good grace grade grain grand grass gravity gray great green grid ground
group growth guard guest guide guitar hair half hall hammer hand happy harbor hard harvest health heart heat heavy
height hero hill history hobby hockey hole home honey honor hook hope horn horse hospital hotel hour house human humor
hunger hunter husband idea image inch income index infant insect iron island item jacket jail jazz joint joke journal
journey judge juice jump jungle junior jury justice keen king kiss kitchen knee knife knight label labor ladder lady
lake lamp land language large laser late lawn lawyer layer leader leaf league leather lecture legend lemon lens lesson
letter level liberty library light limit line lion liquid list little load loan local lock logic long loop lord loss
loud love lover lower luck lunch lung machine magic mail major manner marble march margin market mask mass master
match material math matter meal meat medal medicine member memory metal meter method middle midnight milk mill mind
mine minor minute mirror mission mixed model modern moment money monitor monkey monster month moon moral morning
mother motion motor mountain mouse mouth movie muscle museum music mystery nail name narrow nation native nature navy
near neck nerve nest network night nine noble noise normal north nose note novel number nurse object ocean office
officer open opera orange order organ outer oven owner pack page pain paint painter pair palace pale panel paper
parade parent park part partner party pass past paste path patient pattern pause peace peak pencil people pepper
period person phase phone photo phrase piano picture piece pilot pink pipe pitch pizza place plain plan plane planet
plant plastic plate player plot pocket poem poet poetry point police policy pond pool poor port post potato pound
powder power prayer press pretty price pride priest prime prince print prison private prize profit project proof proud
public pump pupil pure purple purse quarter queen quick quiet rabbit race radio rail rain random range rapid rare rate
ratio reader rear rebel record region relief rent report rescue rest rice rich rider rifle right ring river road robot
rock role roof room root rope rose rough round route royal rubber rule ruler rural sacred safe sail salad salt sand
sauce scale scene school science score screen script seal season seat second secret section seed senior series seven
shadow shape share sharp sheep sheet shelf shell shield shift ship shirt shock shoe shop shore short shot show sick
side sign signal silence silk silver simple singer single sister size skill skin skirt slave sleep slow small smart
smell smile smoke smooth snake snow soap social soft soil solar soldier solid song sound soup source south space
speech speed spell spider spirit split sport spot spring square staff stage stair stake stamp star state station
statue steady steam steel stem step stick still stock stomach stone store storm story stove strange stream street
string strip strong studio study style sugar suit summer surface sweet swim switch sword symbol system table tail tale
tank tape target task taste teacher team tear temple tennis tent test text theater theme theory thick thin thing
thirty throat throne thumb ticket tide tiger tight tile timber time title toast today tone tongue tool tooth topic
total touch tough tour tower town track trade trail train treaty tree trial tribe trick trip troop truck trunk trust
truth tube tune tunnel twelve twenty twin type uncle union unit universe upper urban urine usual valley value vast
vector vehicle vein velvet version vessel video view village violin virus vision visit vital voice volume vote voyage
wage wagon wake wall waste watch water wave weak wealth weapon weather week weight west wheat wheel whip white wide
wife wild wind window wine wing winner winter wire wise wolf woman wood wool word worker world worm worth yard year
yellow young youth zero zone
"""

COMMON: tuple[str, ...] = tuple(_TEXT.split())
