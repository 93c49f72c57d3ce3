//! A watch's lines, each an event.

use std::io;
use std::pin::Pin;
use std::time::Duration;

use bytes::Bytes;
use futures::io::{AsyncBufRead, AsyncBufReadExt as _, AsyncReadExt as _};
use kube::Client;
use kube::core::Status;
use serde::Deserialize;
use serde_json::value::RawValue;
use tokio::time::Instant;

use super::Error;

/// Longer than the event of any object that etcd takes.
const MAX_BYTES: u64 = 8 << 20;

/// A watch that has ended before was none.
const AT_ONCE: Duration = Duration::from_secs(1);

/// A watch that is open.
pub(super) struct Lines {
    reader: Pin<Box<dyn AsyncBufRead + Send>>,
    opened: Instant,
    /// The server should have ended it by then.
    until: Instant,
    /// There was one.
    any: bool,
}

impl Lines {
    pub(super) async fn open(
        client: &Client,
        request: http::Request<Vec<u8>>,
        patience: Duration,
    ) -> Result<Self, Error> {
        let reader = Box::pin(client.request_stream(request).await?);
        let opened = Instant::now();
        Ok(Self { reader, opened, until: opened + patience, any: false })
    }

    /// It brought nothing, and has hardly begun: a server that does so must not be asked in a tight loop.
    pub(super) fn was_refused(&self) -> bool {
        !self.any && self.opened.elapsed() < AT_ONCE
    }

    /// `None` at the end, also of a line that is cut short by it, and when the server has been silent for too long.
    pub(super) async fn next(&mut self) -> io::Result<Option<Bytes>> {
        let mut line = Vec::new();
        let mut reader = self.reader.as_mut().take(MAX_BYTES);
        match tokio::time::timeout_at(self.until, reader.read_until(b'\n', &mut line)).await {
            Err(_elapsed) => return Ok(None),
            Ok(read) => read?,
        };
        if line.pop() == Some(b'\n') {
            self.any = true;
            return Ok(Some(line.into()));
        }
        if line.len() as u64 + 1 >= MAX_BYTES {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "an event without end"));
        }
        Ok(None)
    }
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
