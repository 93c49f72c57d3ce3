//! A watch of one kind whose objects go on as the JSON that came: their reader knows which few fields it wants. Here nothing is read
//! but what the protocol says.
//!
//! States: `Start` → `List`, page by page → `Watch` from the newest version seen → (it ends or breaks) `Watch` → (410) `Start`.

pub mod fuzz;
mod lines;
mod page;

use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt as _;
use futures::stream::{self, BoxStream};
use kube::api::WatchParams;
use kube::core::Request;
use kube::runtime::utils::Backoff as _;
use kube::runtime::watcher::{DefaultBackoff, Event};
use kube::{Client, Resource};

use self::lines::{Line, Lines};
use self::page::Page;

/// The API server ends a watch after this; below upstream's minimum request timeout.
const WATCH_SECONDS: u32 = 290;
/// One that goes on for so much longer has lost its server.
const WATCH_MARGIN: Duration = Duration::from_secs(5);

/// Why a feed stands still for a while.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// The API server refused.
    #[error("the API server refuses")]
    Refused(#[from] kube::Error),
    /// The request can't be made.
    #[error("cannot make the request")]
    Request(#[from] kube::core::request::Error),
    /// The connection broke.
    #[error("cannot read the answer")]
    Read(#[from] std::io::Error),
    /// What came is no page of a list.
    #[error("the answer is no list")]
    Page(#[from] serde_json::Error),
    /// The list doesn't say of which version it is.
    #[error("the list has no resource version")]
    Unversioned,
    /// The server ended a watch at once.
    #[error("the watch ended at once")]
    Empty,
}

impl Error {
    /// The version to go on from is too old.
    fn is_expired(&self) -> bool {
        matches!(self, Self::Refused(kube::Error::Api(status)) if status.code == 410)
    }
}

/// Objects of a kind as they are listed and changed, for ever. What fails is said, and tried again with a growing wait.
pub(crate) fn feed<K: Resource<DynamicType = ()>>(
    client: &Client,
    what: &'static str,
) -> BoxStream<'static, Event<Bytes>> {
    let requests = Request::new(K::url_path(&(), None));
    let feed = Feed {
        client: client.clone(),
        requests,
        what,
        state: State::Start,
        backoff: DefaultBackoff::default(),
        failed: false,
    };
    stream::unfold(feed, |mut feed| async { Some((feed.next().await, feed)) }).boxed()
}

struct Feed {
    client: Client,
    requests: Request,
    what: &'static str,
    state: State,
    backoff: DefaultBackoff,
    failed: bool,
}

enum State {
    /// A list is to begin.
    Start,
    /// One is in progress.
    List(Page),
    /// All that was known at a version has been handed on, and nobody watches.
    Listed(Position),
    /// A watch is open.
    Watch(Lines, Position),
}

/// Where a watch goes on.
#[derive(Clone, Debug)]
enum Position {
    /// From a version.
    At(String),
    /// Behind an object, whose version is read only if it is wanted.
    Behind(Bytes),
}

impl Position {
    /// `None` if the object doesn't tell: a new list must.
    fn version(&self) -> Option<String> {
        match self {
            Self::At(version) => Some(version.clone()),
            Self::Behind(object) => lines::version(object),
        }
    }
}

impl Feed {
    async fn next(&mut self) -> Event<Bytes> {
        loop {
            match self.step().await {
                Ok(Some(event)) => {
                    if std::mem::take(&mut self.failed) {
                        self.backoff.reset();
                    }
                    return event;
                }
                Ok(None) => {}
                Err(error) => {
                    if error.is_expired() {
                        self.state = State::Start;
                    }
                    let what = self.what;
                    tracing::warn!(%error, source = ?std::error::Error::source(&error), what, "watch failed, will be tried again");
                    self.failed = true;
                    if let Some(wait) = self.backoff.next() {
                        tokio::time::sleep(wait).await;
                    }
                }
            }
        }
    }

    async fn step(&mut self) -> Result<Option<Event<Bytes>>, Error> {
        match std::mem::replace(&mut self.state, State::Start) {
            State::Start => {
                self.state = State::List(Page::default());
                Ok(Some(Event::Init))
            }
            State::List(mut page) => {
                if let Some(object) = page.objects.next() {
                    self.state = State::List(page);
                    return Ok(Some(Event::InitApply(object)));
                }
                if let Some(version) = page.last {
                    self.state = State::Listed(Position::At(version));
                    return Ok(Some(Event::InitDone));
                }
                // Pages belong together: if one fails the list begins anew.
                let request = self.requests.list(&page::params(page.next))?;
                self.state = State::List(page::fetch(&self.client, request).await?);
                Ok(None)
            }
            State::Listed(position) => {
                let Some(version) = position.version() else { return Ok(None) };
                self.state = State::Listed(position.clone());
                let params = WatchParams { timeout: Some(WATCH_SECONDS), ..WatchParams::default() };
                let request = self.requests.watch(&params, &version)?;
                let lines = Lines::open(&self.client, request, self.patience()).await?;
                self.state = State::Watch(lines, position);
                Ok(None)
            }
            State::Watch(lines, position) => self.watch(lines, position).await,
        }
    }

    fn patience(&self) -> Duration {
        Duration::from_secs(WATCH_SECONDS.into()) + WATCH_MARGIN
    }

    async fn watch(&mut self, mut lines: Lines, position: Position) -> Result<Option<Event<Bytes>>, Error> {
        self.state = State::Listed(position.clone());
        let Some(line) = lines.next().await? else {
            return if lines.was_refused() { Err(Error::Empty) } else { Ok(None) };
        };
        let (event, position) = match Line::read(&line) {
            Ok(Line::Applied(object)) => (Some(Event::Apply(object.clone())), Position::Behind(object)),
            Ok(Line::Deleted(object)) => (Some(Event::Delete(object.clone())), Position::Behind(object)),
            Ok(Line::Bookmark(object)) => (None, Position::Behind(object)),
            Ok(Line::Failed(status)) => return Err(kube::Error::Api(status).into()),
            // It must not keep those behind it from anybody, and would come again in every watch from the version before it.
            Err(error) => {
                tracing::warn!(%error, what = self.what, "cannot read an event, it is left out");
                (None, position)
            }
        };
        self.state = State::Watch(lines, position);
        Ok(event)
    }
}

#[cfg(test)]
mod tests;
