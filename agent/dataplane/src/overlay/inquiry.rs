//! What looks into the network beside the dataplane: it is told what to look at, and says what it has found.

use tokio::sync::watch;

/// The dataplane's end.
#[derive(Debug)]
pub(crate) struct Inquiry<S, F> {
    subjects: watch::Sender<S>,
    /// What is found.
    pub(crate) found: watch::Receiver<F>,
}

impl<S: Default + PartialEq, F: Default> Inquiry<S, F> {
    /// With the other end, of who looks.
    pub(super) fn open() -> (Self, watch::Receiver<S>, watch::Sender<F>) {
        let (subjects, to_look_at) = watch::channel(S::default());
        let (find, found) = watch::channel(F::default());
        (Self { subjects, found }, to_look_at, find)
    }

    /// Says what is to be looked at.
    pub(crate) fn set(&self, subjects: S) {
        self.subjects.send_if_modified(|before| {
            let news = *before != subjects;
            *before = subjects;
            news
        });
    }
}
