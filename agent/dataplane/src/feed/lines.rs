//! A watch's lines, each an event.

use std::io;
use std::pin::Pin;
use std::time::Duration;

use bytes::{Buf as _, Bytes};
use http_body_util::{BodyExt as _, Limited};
use kube::Client;
use kube::client::Body;
use kube::core::Status;
use serde::Deserialize;
use serde_json::value::RawValue;
use tokio::time::{Instant, Sleep};

use super::Error;

/// Longer than the event of any object that etcd takes.
const MAX_BYTES: usize = 8 << 20;

/// A watch that has ended before was none.
const AT_ONCE: Duration = Duration::from_secs(1);

/// A watch that is open.
pub(super) struct Lines {
    body: Body,
    /// What came and is not handed on yet: as it came if that is possible, or else put together.
    here: Bytes,
    begun: Vec<u8>,
    opened: Instant,
    /// The server should have ended it by then.
    until: Pin<Box<Sleep>>,
    /// There was one.
    any: bool,
}

impl Lines {
    pub(super) async fn open(
        client: &Client,
        request: http::Request<Vec<u8>>,
        patience: Duration,
    ) -> Result<Self, Error> {
        let answer = client.send(request.map(Body::from)).await?;
        if !answer.status().is_success() {
            return Err(refusal(answer).await);
        }
        let opened = Instant::now();
        Ok(Self {
            body: answer.into_body(),
            here: Bytes::new(),
            begun: Vec::new(),
            opened,
            until: Box::pin(tokio::time::sleep_until(opened + patience)),
            any: false,
        })
    }

    /// It brought nothing, and has hardly begun: a server that does so must not be asked in a tight loop.
    pub(super) fn was_refused(&self) -> bool {
        !self.any && self.opened.elapsed() < AT_ONCE
    }

    /// `None` at the end, also of a line that is cut short by it, and when the server has been silent for too long.
    pub(super) async fn next(&mut self) -> io::Result<Option<Bytes>> {
        loop {
            if let Some(line) = self.take_line() {
                self.any = true;
                return Ok(Some(line));
            }
            if self.begun.len() > MAX_BYTES {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "an event without end"));
            }
            let frame = tokio::select! {
                biased;
                frame = self.body.frame() => frame,
                () = &mut self.until => None,
            };
            let Some(frame) = frame else { return Ok(None) };
            self.here = frame.map_err(io::Error::other)?.into_data().unwrap_or_default();
        }
    }

    /// A line that is whole. What is left without an end waits for the rest, and nothing is left where it came.
    fn take_line(&mut self) -> Option<Bytes> {
        let Some(end) = self.here.iter().position(|byte| *byte == b'\n') else {
            self.begun.extend_from_slice(&std::mem::take(&mut self.here));
            return None;
        };
        let last = self.here.split_to(end);
        self.here.advance(1);
        if self.begun.is_empty() {
            return Some(last);
        }
        let mut line = std::mem::take(&mut self.begun);
        line.extend_from_slice(&last);
        Some(line.into())
    }
}

/// What the server says instead of a watch.
async fn refusal(answer: http::Response<Body>) -> Error {
    let code = answer.status().as_u16();
    let text = match Limited::new(answer.into_body(), MAX_BYTES).collect().await {
        Ok(text) => text.to_bytes(),
        Err(error) => return Error::Read(io::Error::other(error)),
    };
    let status = serde_json::from_slice(&text).unwrap_or_else(|_| {
        // It is not from an API server, but from something on the way.
        Status::failure(&String::from_utf8_lossy(&text), "Unknown").with_code(code)
    });
    kube::Error::Api(status.boxed()).into()
}

/// An event, with its object as it came.
#[derive(Debug)]
pub(super) enum Line {
    Applied(Bytes),
    Deleted(Bytes),
    /// Nothing but a newer version.
    Bookmark(Bytes),
    Failed(Box<Status>),
}

impl Line {
    /// The object stays where it is in the line.
    pub(super) fn read(line: &Bytes) -> Result<Self, serde_json::Error> {
        #[derive(Deserialize)]
        #[serde(rename_all = "UPPERCASE")]
        enum Kind {
            Added,
            Modified,
            Deleted,
            Bookmark,
            Error,
        }
        #[derive(Deserialize)]
        struct Event<'a> {
            #[serde(rename = "type")]
            kind: Kind,
            #[serde(borrow)]
            object: &'a RawValue,
        }
        let Event { kind, object } = serde_json::from_slice(line)?;
        let bytes = line.slice_ref(object.get().as_bytes());
        Ok(match kind {
            Kind::Added | Kind::Modified => Self::Applied(bytes),
            Kind::Deleted => Self::Deleted(bytes),
            Kind::Bookmark => Self::Bookmark(bytes),
            Kind::Error => Self::Failed(serde_json::from_str(object.get())?),
        })
    }
}

/// The resource version of an object.
pub(super) fn version(object: &[u8]) -> Option<String> {
    #[derive(Deserialize)]
    struct Object {
        metadata: Metadata,
    }
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Metadata {
        resource_version: String,
    }
    let object: Object = serde_json::from_slice(object).ok()?;
    Some(object.metadata.resource_version).filter(|version| !version.is_empty())
}
