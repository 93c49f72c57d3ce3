//! A watcher's stream: first the log, then what the writer publishes, with nothing between lost or doubled.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use futures::StreamExt;
use tokio::sync::mpsc::error::TryRecvError;

use super::Shared;
use super::database::ChunkBounds;
use super::hub::Subscription;
use crate::{Batch, Error, Event, Range, Revision, Watch};

/// How much of the log one step of a catch-up reads: enough to be quick, little enough to hold in memory per watcher.
const CHUNK: ChunkBounds = ChunkBounds { records: 512, bytes: 1 << 20 };

struct Watcher {
    shared: Arc<Shared>,
    range: Range,
    /// Everything up to here has been delivered.
    last: Revision,
    state: State,
}

enum State {
    /// The first batch is still to be sent.
    Opening(Option<Box<Subscription>>),
    /// Reading the log; not subscribed, so a slow reader costs nobody anything.
    CatchingUp,
    /// Subscribed; the log is read up to where the subscription begins.
    Closing(Box<Subscription>),
    Live(Box<Subscription>),
    Ended,
}

/// Opens a watch. Behind `after` if that isn't 0, else from now on.
pub(super) fn open(shared: Arc<Shared>, range: Range, after: Revision) -> Result<Watch, Error> {
    let (last, subscription) = if after.0 == 0 {
        let subscription = shared.subscribe(range.clone());
        (subscription.from, Some(Box::new(subscription)))
    } else {
        let view = shared.db.view();
        let (current, oldest) = (view.revision()?, view.compacted()?);
        if after > current {
            return Err(Error::Future { requested: after, current });
        }
        if after < oldest {
            return Err(Error::Compacted { requested: after, oldest });
        }
        (after, None)
    };
    let watcher = Watcher { shared, range, last, state: State::Opening(subscription) };
    Ok(futures::stream::unfold(watcher, |mut watcher| async move {
        let next = watcher.next().await;
        if matches!(next, Some(Err(_))) {
            watcher.state = State::Ended;
        }
        next.map(|batch| (batch, watcher))
    })
    .boxed())
}

impl Watcher {
    async fn next(&mut self) -> Option<Result<Batch, Error>> {
        loop {
            match std::mem::replace(&mut self.state, State::Ended) {
                State::Opening(subscription) => {
                    self.state = subscription.map_or(State::CatchingUp, State::Live);
                    return Some(Ok(Batch { revision: self.last, events: Vec::new() }));
                }
                State::CatchingUp => match self.read(Revision(u64::MAX)).await {
                    Err(error) => return Some(Err(error)),
                    Ok((batch, true)) => {
                        // Near the end: the rest, if any, is read with the queue already filling.
                        self.state = State::Closing(Box::new(self.shared.subscribe(self.range.clone())));
                        if let Some(batch) = batch {
                            return Some(Ok(batch));
                        }
                    }
                    Ok((batch, false)) => {
                        self.state = State::CatchingUp;
                        if let Some(batch) = batch {
                            return Some(Ok(batch));
                        }
                    }
                },
                State::Closing(subscription) if self.last >= subscription.from => {
                    self.state = State::Live(subscription);
                }
                State::Closing(subscription) => match self.read(subscription.from).await {
                    Err(error) => return Some(Err(error)),
                    Ok((batch, _)) => {
                        self.state = State::Closing(subscription);
                        if let Some(batch) = batch {
                            return Some(Ok(batch));
                        }
                    }
                },
                State::Live(mut subscription) => {
                    let next = self.live(&mut subscription).await;
                    self.state = State::Live(subscription);
                    return Some(next);
                }
                State::Ended => return None,
            }
        }
    }

    /// Reads the next part of the log; a batch if it says anything, and whether the end was reached.
    async fn read(&mut self, until: Revision) -> Result<(Option<Batch>, bool), Error> {
        let (after, range) = (self.last, self.range.clone());
        let (events, through, end) = self
            .shared
            .read(move |view| {
                let chunk = view.log(after, until, CHUNK)?;
                if after < chunk.compacted {
                    return Err(Error::Compacted { requested: after, oldest: chunk.compacted });
                }
                let wanted = chunk.records.into_iter().filter(|(_, record)| range.contains(&record.key));
                let events: Result<Vec<Event>, Error> =
                    wanted.map(|(place, record)| view.event(place, record)).collect();
                Ok((events?, chunk.through, chunk.through >= until.min(view.revision()?)))
            })
            .await?;
        let moved = through > self.last;
        self.last = through;
        Ok((moved.then_some(Batch { revision: through, events }), end))
    }

    /// The next batch from the queue, or word that a revision had nothing for this watcher.
    async fn live(&mut self, subscription: &mut Subscription) -> Result<Batch, Error> {
        loop {
            // Read before the queue: what was published by then is in the queue by then.
            let published = *subscription.published.borrow_and_update();
            match subscription.queue.try_recv() {
                // A group that the catch-up had already read.
                Ok(batch) if batch.revision <= self.last => continue,
                Ok(batch) => {
                    self.last = batch.revision;
                    return Ok(batch);
                }
                Err(TryRecvError::Disconnected) => return Err(Self::dropped(subscription)),
                Err(TryRecvError::Empty) => {}
            }
            if published > self.last {
                self.last = published;
                return Ok(Batch { revision: published, events: Vec::new() });
            }
            tokio::select! {
                changed = subscription.published.changed() => if changed.is_err() {
                    return Err(Self::dropped(subscription));
                },
                batch = subscription.queue.recv() => match batch {
                    Some(batch) if batch.revision <= self.last => {}
                    Some(batch) => {
                        self.last = batch.revision;
                        return Ok(batch);
                    }
                    None => return Err(Self::dropped(subscription)),
                },
            }
        }
    }

    fn dropped(subscription: &Subscription) -> Error {
        if subscription.lagged.load(Ordering::Acquire) {
            Error::Lagged
        } else {
            Error::Unavailable { during: "watching: it is stopping", source: None }
        }
    }
}
