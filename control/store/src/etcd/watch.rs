//! Watches on etcd: whole revisions, progress, and going on after a disconnection from where they were.

use std::time::Duration;

use etcd_client::{Client, EventType, WatchOptions, WatchResponse, WatchStream};
use futures::StreamExt;

use super::{CALL_TIMEOUT, EtcdStore, MESSAGE_BYTES, failed, from_etcd, kv_of, revision, to_etcd};
use crate::{Batch, Error, Event, Range, Revision, Watch};

/// How long a watch is quiet before it asks how far it is. Others write below other prefixes and move the revision.
const QUIET: Duration = Duration::from_millis(250);

/// The wait before a lost watch is opened again: the first, and the longest, each doubling the one before.
const RETRY: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(5));

/// From which release on a requested progress report can't overtake events (etcd-io/etcd#15220).
/// Before it, a watch only knows how far it is from events, and from the reports that etcd makes by itself (every 10 minutes).
pub(super) fn progress_is_in_order(version: &str) -> bool {
    let mut numbers = version.split(['.', '-', '+']).map_while(|part| part.parse::<u32>().ok());
    let (Some(major), Some(minor)) = (numbers.next(), numbers.next()) else { return false };
    let patch = numbers.next().unwrap_or(0);
    match (major, minor) {
        (3, 4) => patch >= 25,
        (3, 5) => patch >= 8,
        (major, minor) => (major, minor) >= (3, 6),
    }
}

struct Watcher {
    client: Client,
    prefix: String,
    start: Vec<u8>,
    end: Vec<u8>,
    ask_progress: bool,
    /// Everything up to here has been delivered.
    last: Revision,
    opened: bool,
    stream: Option<WatchStream>,
    ended: bool,
}

/// Opens a watch behind `after`, or from now on if that is 0.
pub(super) async fn open(store: &EtcdStore, range: &Range, after: Revision) -> Result<Watch, Error> {
    let (start, end) = store.full_range(range);
    let mut watcher = Watcher {
        client: store.client.clone(),
        prefix: store.prefix.clone(),
        start,
        end,
        ask_progress: store.ask_progress,
        last: after,
        opened: false,
        stream: None,
        ended: false,
    };
    let current = watcher.connect().await?;
    if after > current {
        return Err(Error::Future { requested: after, current });
    }
    if after.0 == 0 {
        watcher.last = current;
    }
    Ok(futures::stream::unfold(watcher, |mut watcher| async move {
        if watcher.ended {
            return None;
        }
        let next = watcher.next().await;
        watcher.ended = next.is_err();
        Some((next, watcher))
    })
    .boxed())
}

impl Watcher {
    /// Opens the stream behind `last`; answers the revision that the server was at.
    async fn connect(&mut self) -> Result<Revision, Error> {
        let during = "opening a watch on etcd";
        let mut options =
            WatchOptions::new().with_range(self.end.clone()).with_prev_key().with_progress_notify();
        if self.last.0 != 0 {
            options = options.with_start_revision(to_etcd(self.last) + 1);
        }
        let mut client = self.client.watch_client().max_decoding_message_size(MESSAGE_BYTES);
        let open = async {
            let mut stream = client
                .watch(self.start.clone(), Some(options))
                .await
                .map_err(|error| failed(during, error))?;
            let first = stream.message().await.map_err(|error| failed(during, error))?;
            let first = first.ok_or(Error::Unavailable { during, source: None })?;
            if !first.created() {
                return Err(Error::Unavailable { during, source: None });
            }
            Ok((stream, revision(first.header())?))
        };
        let opened = tokio::time::timeout(CALL_TIMEOUT, open).await;
        let (stream, current) =
            opened.map_err(|elapsed| Error::Unavailable { during, source: Some(Box::new(elapsed)) })??;
        self.stream = Some(stream);
        Ok(current)
    }

    /// The next batch. A lost connection isn't an error: the watch goes on from `last` once the server is back.
    async fn next(&mut self) -> Result<Batch, Error> {
        if !self.opened {
            self.opened = true;
            return Ok(Batch { revision: self.last, events: Vec::new() });
        }
        let mut pause = RETRY.0;
        loop {
            let Some(stream) = &mut self.stream else {
                match self.connect().await {
                    Ok(_) => continue,
                    Err(error) => {
                        tracing::warn!(%error, after = self.last.0, "a watch on etcd is lost; opening it again");
                        tokio::time::sleep(pause).await;
                        pause = (pause * 2).min(RETRY.1);
                        continue;
                    }
                }
            };
            let message = match tokio::time::timeout(QUIET, stream.message()).await {
                Ok(message) => message,
                Err(_) => {
                    if self.ask_progress && stream.request_progress().await.is_err() {
                        self.stream = None;
                    }
                    continue;
                }
            };
            match message {
                Ok(Some(response)) => {
                    if let Some(batch) = self.batch(&response)? {
                        return Ok(batch);
                    }
                }
                Ok(None) | Err(_) => {
                    self.stream = None;
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(RETRY.1);
                }
            }
        }
    }

    /// What a message says. Without `fragment`, etcd sends whole revisions.
    fn batch(&mut self, response: &WatchResponse) -> Result<Option<Batch>, Error> {
        if response.compact_revision() != 0 {
            let oldest = from_etcd(response.compact_revision());
            return Err(Error::Compacted { requested: self.last, oldest });
        }
        if response.canceled() {
            // The server gave the watch up (a leader lost, a permission): ask again.
            self.stream = None;
            return Ok(None);
        }
        let events: Vec<Event> =
            response.events().iter().map(|event| event_of(&self.prefix, event)).collect::<Result<_, _>>()?;
        // With events, the header tells the server's revision, which may be ahead of what was sent.
        let through =
            events.last().map_or_else(|| revision(response.header()), |event| Ok(event.revision()))?;
        if through <= self.last {
            return Ok(None);
        }
        self.last = through;
        Ok(Some(Batch { revision: through, events }))
    }
}

fn event_of(prefix: &str, event: &etcd_client::Event) -> Result<Event, Error> {
    let kv = event.kv().ok_or_else(|| Error::Damaged("etcd sent an event without a key".to_owned()))?;
    let kv = kv_of(prefix, kv)?;
    let prev = event.prev_kv().map(|prev| kv_of(prefix, prev)).transpose()?;
    Ok(match event.event_type() {
        EventType::Put => Event::Put { kv, prev },
        EventType::Delete => Event::Delete { key: kv.key, revision: kv.mod_revision, prev },
    })
}

/// The compacted revision. etcd tells it only to a watch that starts below it.
pub(super) async fn oldest_retained(client: &Client) -> Result<Revision, Error> {
    let during = "asking etcd what it retains";
    let probe = async {
        let options = WatchOptions::new().with_start_revision(1);
        let mut stream = client.watch_client().watch("\0", Some(options)).await?;
        while let Some(message) = stream.message().await? {
            if message.compact_revision() != 0 {
                return Ok(from_etcd(message.compact_revision()));
            }
        }
        Ok(Revision(0))
    };
    match tokio::time::timeout(CALL_TIMEOUT, probe).await {
        Ok(answer) => answer.map_err(|error| failed(during, error)),
        Err(elapsed) => Err(Error::Unavailable { during, source: Some(Box::new(elapsed)) }),
    }
}

#[cfg(test)]
mod tests {
    use super::progress_is_in_order;

    #[test]
    fn progress_is_asked_for_only_where_it_can_be_trusted() {
        for (version, trusted) in [
            ("3.4.23", false),
            ("3.4.25", true),
            ("3.5.1", false),
            ("3.5.8", true),
            ("3.5.21-rc.0", true),
            ("3.6.0", true),
            ("3.3.27", false),
            ("4.0.0", true),
            ("", false),
            ("main", false),
        ] {
            assert_eq!(progress_is_in_order(version), trusted, "{version}");
        }
    }
}
