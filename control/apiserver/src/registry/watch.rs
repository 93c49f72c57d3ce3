//! Owns watches: each is a position in the cache's changes. No watcher has a queue of its own, so a slow one
//! costs nothing; one that falls out of what is kept is told so (410) and lists again.
//!
//! ```text
//! initial objects ─> initial-events-end bookmark ─┐
//!                                                 ├─> changes, a bookmark every minute ─> end (timeout, 410, stop)
//! a revision named by the client ─────────────────┘
//! ```

use super::list::Selection;
use super::output::{Tabler, partial};
use super::{Call, convert, options, shape};
use crate::accept::Shape;
use crate::api::Api;
use crate::body::{self, BoxError, Response};
use crate::cache::{Change, Item, Resume, in_namespace};
use bytes::Bytes;
use http::header::{CONTENT_TYPE, HeaderValue};
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch::Receiver;
use tokio::time::Instant;
use weft_control_api::field::{FieldError, FieldPath};
use weft_control_api::kinds::Kind;
use weft_control_api::status::{GroupKind, Status};

/// Pause between bookmarks, as upstream.
const BOOKMARK_PERIOD: Duration = Duration::from_secs(60);
/// Watches without a timeout of their own end after this and up to twice this, as upstream.
const MIN_TIMEOUT: Duration = Duration::from_secs(1800);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Type {
    Added,
    Modified,
    Deleted,
}

impl Type {
    fn head(self) -> Bytes {
        Bytes::from_static(match self {
            Self::Added => b"{\"type\":\"ADDED\",\"object\":",
            Self::Modified => b"{\"type\":\"MODIFIED\",\"object\":",
            Self::Deleted => b"{\"type\":\"DELETED\",\"object\":",
        })
    }
}

struct Watcher {
    api: Arc<Api>,
    resource: usize,
    kind: &'static Kind,
    storage: &'static Kind,
    selection: Selection,
    shape: Shape,
    tabler: Option<Tabler>,
    columns_sent: bool,
    /// Everything up to this revision has been sent.
    position: u64,
    pending: VecDeque<Bytes>,
    /// Initial objects, sent bit by bit so that they aren't all rendered at once.
    initial: VecDeque<Arc<Item>>,
    /// Tell the end of the initial objects.
    mark_initial_end: bool,
    changed: Receiver<u64>,
    bookmarks: bool,
    next_bookmark: Instant,
    deadline: Instant,
    ended: bool,
}

/// Where a watch begins.
enum Start {
    /// With all objects, which are at least this new.
    Objects { mark_end: bool },
    /// After a revision.
    After(u64),
    /// From now on.
    Now,
}

/// Answers a watch.
pub(super) async fn answer(call: &Call) -> Result<Response, Status> {
    let shape = shape(call)?;
    let selection = Selection::of(call)?;
    let start = start(call).await?;
    let tabler = match shape {
        Shape::Table(version) => Some(Tabler::new(call, version)?),
        Shape::Object | Shape::Metadata | Shape::Discovery(_) => None,
    };
    let now = Instant::now();
    let resource = call.stored();
    let mut watcher = Watcher {
        api: call.api.clone(),
        resource: resource.id,
        kind: call.kind,
        storage: resource.storage,
        selection,
        shape,
        tabler,
        columns_sent: false,
        position: 0,
        pending: VecDeque::new(),
        initial: VecDeque::new(),
        mark_initial_end: false,
        changed: call.api.cache.subscribe(resource.id),
        bookmarks: call.query.flag("allowWatchBookmarks"),
        next_bookmark: now + BOOKMARK_PERIOD,
        deadline: now + timeout(call)?,
        ended: false,
    };
    watcher.begin(start);
    let chunks = futures::stream::unfold(watcher, |mut watcher| async move {
        let chunk = watcher.next().await?;
        Some((Ok::<Bytes, BoxError>(chunk), watcher))
    });
    let mut response = Response::new(body::stream(chunks));
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    Ok(response)
}

fn timeout(call: &Call) -> Result<Duration, Status> {
    match call.query.get("timeoutSeconds").map(str::parse::<u64>) {
        None | Some(Ok(0)) => Ok(MIN_TIMEOUT + MIN_TIMEOUT.mul_f64(rand::random::<f64>())),
        Some(Ok(seconds)) => Ok(Duration::from_secs(seconds)),
        Some(Err(error)) => Err(Status::bad_request(format!("invalid timeoutSeconds: {error}"))),
    }
}

fn invalid(field: &str, detail: &str) -> Status {
    let error = FieldError::forbidden(&FieldPath::new(field), detail);
    Status::invalid(GroupKind { group: "meta.k8s.io", kind: "ListOptions" }, "", vec![error])
}

async fn start(call: &Call) -> Result<Start, Status> {
    let version = call.query.get("resourceVersion");
    let mode = call.query.get("resourceVersionMatch");
    let initial = call.query.get("sendInitialEvents").map(|_text| call.query.flag("sendInitialEvents"));
    match (initial, mode) {
        (None, Some(_)) => {
            return Err(invalid(
                "resourceVersionMatch",
                "resourceVersionMatch is forbidden for watch unless sendInitialEvents is provided",
            ));
        }
        (Some(_), mode) if mode != Some("NotOlderThan") => {
            return Err(invalid(
                "resourceVersionMatch",
                "sendInitialEvents requires setting resourceVersionMatch to NotOlderThan",
            ));
        }
        _ => {}
    }
    match (version, initial) {
        (None, _) => call.api.freshen().await?,
        (Some("0"), _) => {}
        (Some(text), Some(true)) => {
            options::wait_for_revision(&call.api, text).await?;
        }
        (Some(text), _) => return Ok(Start::After(options::revision(text)?)),
    }
    Ok(match initial {
        Some(true) => Start::Objects { mark_end: call.query.flag("allowWatchBookmarks") },
        Some(false) => Start::Now,
        None => Start::Objects { mark_end: false },
    })
}

impl Watcher {
    fn begin(&mut self, start: Start) {
        match start {
            Start::After(revision) => self.position = revision,
            Start::Now => self.position = self.api.cache.revision(),
            Start::Objects { mark_end } => {
                let snapshot = self.api.cache.snapshot(self.resource);
                self.position = snapshot.revision;
                self.mark_initial_end = mark_end;
                self.initial = in_namespace(&snapshot.objects, &self.selection.namespace, None)
                    .filter(|item| self.selection.matches(item))
                    .cloned()
                    .collect();
            }
        }
        self.changed.mark_changed();
    }

    /// The next bytes of the stream.
    async fn next(&mut self) -> Option<Bytes> {
        loop {
            if let Some(chunk) = self.pending.pop_front() {
                return Some(chunk);
            }
            if self.ended {
                return None;
            }
            if let Some(item) = self.initial.pop_front() {
                self.send(Type::Added, &item);
                continue;
            }
            if std::mem::take(&mut self.mark_initial_end) {
                self.send_bookmark(true);
                continue;
            }
            self.wait().await;
        }
    }

    async fn wait(&mut self) {
        let bookmark = if self.bookmarks { self.next_bookmark } else { self.deadline };
        let closing = self.api.closing.clone();
        tokio::select! {
            biased;
            () = closing.cancelled() => self.ended = true,
            outcome = self.changed.changed() => match outcome {
                Ok(()) => self.catch_up(),
                Err(_closed) => self.ended = true,
            },
            () = tokio::time::sleep_until(self.deadline) => self.ended = true,
            () = tokio::time::sleep_until(bookmark) => {
                self.catch_up();
                if !self.ended {
                    self.send_bookmark(false);
                }
                self.next_bookmark = Instant::now() + BOOKMARK_PERIOD;
            }
        }
    }

    fn catch_up(&mut self) {
        match self.api.cache.changes_after(self.resource, self.position) {
            Resume::Changes(changes, revision) => {
                for change in &changes {
                    self.change(change);
                }
                // A client may name a revision that isn't there yet; it is waited for.
                self.position = self.position.max(revision);
            }
            Resume::Expired(oldest) => {
                let status =
                    Status::expired(format!("too old resource version: {} ({oldest})", self.position));
                self.pending.push_back(Bytes::from_static(b"{\"type\":\"ERROR\",\"object\":"));
                self.pending.push_back(status.to_json());
                self.pending.push_back(Bytes::from_static(b"}\n"));
                self.ended = true;
            }
        }
    }

    fn change(&mut self, change: &Change) {
        let before = change.previous.as_ref().filter(|item| self.selection.matches(item));
        let after = !change.deleted && self.selection.matches(&change.item);
        match (before, after) {
            (None, true) => self.send(Type::Added, &change.item),
            (Some(_), true) => self.send(Type::Modified, &change.item),
            (Some(_), false) if change.deleted => self.send(Type::Deleted, &change.item),
            // It left the selection: the client sees its last selected state, as of now.
            (Some(before), false) => self.send(Type::Deleted, &before.at_revision(change.revision)),
            (None, false) => {}
        }
    }

    fn send(&mut self, kind: Type, item: &Item) {
        self.pending.push_back(kind.head());
        if self.shape == Shape::Object && std::ptr::eq(self.kind, self.storage) {
            self.pending.push_back(item.event_tail());
            return;
        }
        let json = convert::bytes(item.json(), self.storage, self.kind);
        let bytes = match &self.tabler {
            Some(tabler) => {
                let metadata = json!({"resourceVersion": item.revision.to_string()});
                let first = !std::mem::replace(&mut self.columns_sent, true);
                tabler.table(std::iter::once(&json), &metadata, first)
            }
            None if self.shape == Shape::Metadata => partial(&json),
            None => json,
        };
        self.pending.push_back(bytes);
        self.pending.push_back(Bytes::from_static(b"}\n"));
    }

    fn send_bookmark(&mut self, initial_end: bool) {
        let mut metadata = json!({"creationTimestamp": null, "resourceVersion": self.position.to_string()});
        if initial_end {
            metadata["annotations"] = json!({"k8s.io/initial-events-end": "true"});
        }
        let object: Value = match self.shape {
            Shape::Table(version) => json!({"kind": "Table", "apiVersion": format!("meta.k8s.io/{version}"),
                "metadata": metadata, "columnDefinitions": null, "rows": []}),
            Shape::Metadata => json!({"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1",
                "metadata": metadata}),
            Shape::Object | Shape::Discovery(_) => json!({"kind": self.kind.kind,
                "apiVersion": self.kind.api_version(), "metadata": metadata}),
        };
        self.pending.push_back(Bytes::from(format!("{{\"type\":\"BOOKMARK\",\"object\":{object}}}\n")));
    }
}
