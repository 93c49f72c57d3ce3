//! A page of a list, taken apart into its objects.

use std::vec;

use bytes::Bytes;
use futures::AsyncReadExt as _;
use kube::Client;
use kube::api::ListParams;
use serde::Deserialize;
use serde_json::value::RawValue;

use super::Error;

/// Objects that are asked for at once, as client-go does.
const OBJECTS: u32 = 500;
/// More than a page of the largest objects that etcd takes is nobody's list.
const MAX_BYTES: u64 = OBJECTS as u64 * (3 << 19);

/// What is left of a page. The first one, before any has come, is empty.
#[derive(Debug, Default)]
pub(super) struct Page {
    /// Objects that are not handed on yet.
    pub(super) objects: vec::IntoIter<Bytes>,
    /// Where the next page goes on.
    pub(super) next: Option<String>,
    /// There is no next page: the version of the list.
    pub(super) last: Option<String>,
}

#[derive(Deserialize)]
struct List<'a> {
    #[serde(default)]
    metadata: ListMetadata,
    #[serde(borrow)]
    items: Option<Vec<&'a RawValue>>,
}

#[derive(Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct ListMetadata {
    resource_version: Option<String>,
    #[serde(rename = "continue")]
    next: Option<String>,
}

pub(super) fn params(next: Option<String>) -> ListParams {
    ListParams { limit: Some(OBJECTS), continue_token: next, ..ListParams::default() }
}

pub(super) async fn fetch(client: &Client, request: http::Request<Vec<u8>>) -> Result<Page, Error> {
    let mut text = Vec::new();
    client.request_stream(request).await?.take(MAX_BYTES).read_to_end(&mut text).await?;
    read(&Bytes::from(text))
}

/// The objects stay where they are in the text.
pub(super) fn read(text: &Bytes) -> Result<Page, Error> {
    let list: List<'_> = serde_json::from_slice(text)?;
    let given = |text: Option<String>| text.filter(|text| !text.is_empty());
    let (next, version) = (given(list.metadata.next), given(list.metadata.resource_version));
    let last = if next.is_some() { None } else { Some(version.ok_or(Error::Unversioned)?) };
    let items = list.items.unwrap_or_default();
    let objects: Vec<_> = items.iter().map(|item| text.slice_ref(item.get().as_bytes())).collect();
    Ok(Page { objects: objects.into_iter(), next, last })
}
