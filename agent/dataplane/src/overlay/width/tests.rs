//! What becomes of a way as time goes on.

use super::*;

const TO: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 2));
const LINK: First = First { device: 2, gateway: None, takes_bytes: 1_500, believed_bytes: None };

/// A way whose questions are numbered, and the clock.
struct Walk {
    way: Way,
    number: u16,
    now: Instant,
}

impl Walk {
    fn new() -> Self {
        let now = Instant::now();
        Self { way: Way::new(TO, LINK, None, now), number: 0, now }
    }

    /// Lets time go by until the next question, and answers if it is no larger than `takes`. Says when the way is done with.
    fn step(&mut self, takes: u32) -> bool {
        self.now = self.now.max(self.way.due);
        let Some(bytes) = self.way.due(self.now, EVERY) else { return true };
        self.number += 1;
        self.way.asked(self.number, self.now);
        if bytes <= takes {
            self.way.heard(self.number, self.now, EVERY, Search::answered);
        }
        self.way.search.is_none()
    }

    /// The result of a whole search, and how long it took.
    fn search(&mut self, takes: u32) -> (Option<u32>, Duration) {
        self.now = self.now.max(self.way.due);
        let begun = self.now;
        while !self.step(takes) {}
        (self.way.narrow, self.now - begun)
    }
}

#[test]
fn a_way_that_becomes_narrow_and_wide_again_is_followed() {
    let mut walk = Walk::new();
    assert_eq!(walk.search(1_500), (None, Duration::ZERO));
    let (narrow, took) = walk.search(1_404);
    assert_eq!(narrow, Some(1_404));
    assert!(took < Duration::from_secs(15), "{took:?}");
    let before = walk.now;
    assert_eq!(walk.search(1_404).0, Some(1_404));
    assert!(walk.now - before >= EVERY, "it is asked again only after a while");
    assert_eq!(walk.search(1_450).0, Some(1_450));
    assert_eq!(walk.search(9_000).0, None, "and no more than the link takes is tried");
}

#[test]
fn a_silent_peer_keeps_what_is_known_and_is_asked_less_and_less() {
    let mut walk = Walk::new();
    walk.search(1_400);
    let pauses: Vec<u64> = (0..6)
        .map(|_| {
            assert_eq!(walk.search(0).0, Some(1_400));
            (walk.way.due - walk.now).as_secs()
        })
        .collect();
    assert_eq!(pauses, [5, 10, 20, 40, 60, 60]);
    assert_eq!(walk.search(1_500).0, None);
    walk.search(0);
    assert_eq!((walk.way.due - walk.now).as_secs(), 5, "an answer makes up for it");
}

#[test]
fn answers_to_earlier_questions_say_nothing() {
    let mut walk = Walk::new();
    walk.step(0);
    let late = walk.number;
    walk.step(0);
    walk.way.heard(late, walk.now, EVERY, Search::answered);
    assert!(walk.way.search.is_some(), "{:?}", walk.way);
    walk.way.heard(walk.number, walk.now, EVERY, Search::answered);
    assert!(walk.way.search.is_none(), "{:?}", walk.way);
}

#[test]
fn a_way_that_begins_elsewhere_is_measured_again_at_once() {
    let (found, _) = watch::channel(Widths::new());
    let mut survey = Survey { found, ways: BTreeMap::new(), asked: Instant::now() };
    survey.take_in(&Ways::from([(TO, LINK)]));
    let later = Instant::now() + EVERY;
    let way = survey.ways.get_mut(&TO).unwrap();
    (way.narrow, way.due) = (Some(1_400), later);
    let state = |survey: &Survey| {
        let way = &survey.ways[&TO];
        (way.narrow, way.due >= later)
    };
    survey.take_in(&Ways::from([(TO, LINK)]));
    assert_eq!(state(&survey), (Some(1_400), true));
    let routed = First { gateway: Some([192, 0, 2, 254].into()), ..LINK };
    survey.take_in(&Ways::from([(TO, routed)]));
    assert_eq!(state(&survey), (Some(1_400), false), "what was found holds until there is better");
    survey.take_in(&Ways::from([(TO, First { takes_bytes: 1_400, ..LINK })]));
    assert_eq!(state(&survey), (None, false), "the link itself takes no more");
    survey.take_in(&Ways::from([(TO, First { takes_bytes: 576, ..LINK })]));
    assert!(survey.ways.is_empty(), "nothing to be learned");
    survey.take_in(&Ways::from([(TO, First { believed_bytes: Some(1_400), ..LINK })]));
    assert_eq!(state(&survey), (Some(1_400), false), "as an earlier agent left it");
}

#[test]
fn only_what_turned_is_told() {
    let widths = |all: &[(u8, u32)]| -> Widths {
        all.iter().map(|(last, bytes)| ([192, 0, 2, *last].into(), *bytes)).collect()
    };
    let (before, now) =
        (widths(&[(1, 1_400), (2, 1_400), (3, 1_400)]), widths(&[(2, 1_300), (3, 1_400), (4, 900)]));
    let told: Vec<_> = turns(&before, &now).into_iter().map(|(to, takes)| (to.to_string(), takes)).collect();
    let expected = [("192.0.2.1", None), ("192.0.2.2", Some(1_300)), ("192.0.2.4", Some(900))];
    assert_eq!(told, expected.map(|(to, takes)| (to.to_owned(), takes)));
}
