//! The search for the largest packet that gets through one way. Pure: it says which size to ask with, and is told what came of it.
//!
//! ```text
//! all that the first link takes → answered: done
//!       ↓ lost                                    what is between is halved, after what was found last
//! the least there is → answered: it is narrow → and what a router says has been tried
//!       ↓ lost
//! silent: nothing is learned
//! ```
//!
//! No size counts as lost before a smaller one was answered after it: a node that dies meanwhile is no narrow way.

/// Questions of one size without an answer that make it lost.
const ENOUGH: u8 = 3;

/// What a search has come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// A question of this size has to be asked.
    Ask(u32),
    /// The largest packet that gets through.
    Found(u32),
    /// Nobody answers, even to the least.
    Silent,
}

/// A search that goes on.
#[derive(Clone, Debug)]
pub(super) struct Search {
    /// Gets through whatever the way is.
    least: u32,
    /// The largest that was answered; 0 as long as none was.
    passed: u32,
    /// The smallest that is known to be lost.
    lost: u32,
    /// What may be the size.
    hint: Option<u32>,
    /// Lost if the smaller one is answered that is asked now.
    suspect: Option<u32>,
    asks: u32,
    missed: u8,
}

impl Search {
    /// Between `least` and `full`, which is tried first, and `hint` soon.
    pub(super) fn new(least: u32, full: u32, hint: Option<u32>) -> Self {
        Self { least, passed: 0, lost: full.saturating_add(1), hint, suspect: None, asks: full, missed: 0 }
    }

    /// The size that is asked with now.
    pub(super) fn asks(&self) -> u32 {
        self.asks
    }

    /// The question was answered.
    pub(super) fn answered(&mut self) -> Step {
        self.passed = self.passed.max(self.asks);
        if let Some(suspect) = self.suspect.take() {
            self.lost = self.lost.min(suspect);
        }
        if self.passed.saturating_add(1) >= self.lost {
            return Step::Found(self.passed);
        }
        let next = match self.hint {
            Some(hint) if self.passed < hint && hint < self.lost => hint,
            // Right at what was said: if it is right, one more byte is too much.
            Some(hint) if hint == self.passed => {
                self.hint = None;
                self.passed + 1
            }
            _ => self.passed.midpoint(self.lost),
        };
        self.ask(next)
    }

    /// No answer came in time.
    pub(super) fn missed(&mut self) -> Step {
        self.missed += 1;
        if self.missed < ENOUGH { Step::Ask(self.asks) } else { self.doubt() }
    }

    /// A router says that the packet is too large, and what its next link takes. It is believed no further than that something was
    /// lost: what it says is tried.
    pub(super) fn told(&mut self, takes: u32) -> Step {
        if self.suspect.is_some() {
            return self.missed();
        }
        if takes < self.asks {
            self.hint = Some(takes);
        }
        self.doubt()
    }

    /// What is asked with doesn't get there, or nothing does.
    fn doubt(&mut self) -> Step {
        let smaller = self.passed.max(self.least);
        if self.suspect.is_some() || self.asks <= smaller {
            return Step::Silent;
        }
        self.suspect = Some(self.asks);
        self.ask(smaller)
    }

    fn ask(&mut self, bytes: u32) -> Step {
        self.asks = bytes;
        self.missed = 0;
        Step::Ask(bytes)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A way between two nodes.
    struct Way {
        takes: u32,
        /// Routers on it say what they take.
        says: bool,
        /// Questions that are answered before the peer dies.
        lives: u32,
    }

    /// The outcome, and how many questions it took.
    fn run(mut search: Search, way: &Way) -> (Step, u32) {
        let mut asked = 0;
        let mut step = Step::Ask(search.asks());
        while let Step::Ask(bytes) = step {
            assert_eq!(bytes, search.asks());
            asked += 1;
            assert!(asked < 200, "it doesn't end: {search:?}");
            step = match () {
                () if asked > way.lives => search.missed(),
                () if bytes <= way.takes => search.answered(),
                () if way.says => search.told(way.takes),
                () => search.missed(),
            };
        }
        (step, asked)
    }

    #[test]
    fn what_costs_little_stays_cheap() {
        let way = |takes, says| Way { takes, says, lives: u32::MAX };
        let search = |hint| Search::new(576, 1_500, hint);
        // A wide way; one whose routers say it; one that was known before; one that is dead.
        assert_eq!(run(search(None), &way(1_500, false)), (Step::Found(1_500), 1));
        assert_eq!(run(search(None), &way(1_400, true)), (Step::Found(1_400), 5));
        assert_eq!(run(search(Some(1_400)), &way(1_400, false)), (Step::Found(1_400), 9));
        assert_eq!(run(search(Some(1_400)), &way(0, false)), (Step::Silent, 6));
        assert_eq!(run(search(Some(1_400)), &way(1_500, false)), (Step::Found(1_500), 1), "it is wide again");
    }

    #[test]
    fn a_router_that_lies_is_found_out() {
        let mut search = Search::new(576, 1_500, None);
        assert_eq!(search.told(600), Step::Ask(576));
        assert_eq!(search.answered(), Step::Ask(600));
        assert_eq!(search.answered(), Step::Ask(601));
        assert_eq!(search.answered(), Step::Ask(1_050));
        // Below the least, and more than was asked with: neither is tried.
        assert_eq!(search.told(68), Step::Ask(601));
        assert_eq!(search.answered(), Step::Ask(825));
        assert_eq!(search.told(9_000), Step::Ask(601));
        assert_eq!(search.answered(), Step::Ask(713));
    }

    #[test]
    fn one_loss_is_none() {
        let mut search = Search::new(576, 1_500, None);
        assert_eq!([search.missed(), search.missed()], [Step::Ask(1_500); 2]);
        assert_eq!(search.answered(), Step::Found(1_500));
    }

    proptest! {
        #[test]
        fn each_width_is_found_and_a_dead_peer_has_none(
            takes in 0_u32..10_000, full in 577_u32..9_000, hint in proptest::option::of(0_u32..10_000),
            says: bool, lives in prop_oneof![Just(u32::MAX), 0_u32..60],
        ) {
            let way = Way { takes, says, lives };
            let (step, asked) = run(Search::new(576, full, hint), &way);
            let right = if takes < 576 { Step::Silent } else { Step::Found(takes.min(full)) };
            // Halving takes 14 sizes at most; each is asked three times, and a smaller one for each.
            prop_assert!(asked <= 17 * 6, "{asked}");
            prop_assert!(step == right || (lives != u32::MAX && step == Step::Silent), "{step:?} not {right:?}");
        }
    }
}
