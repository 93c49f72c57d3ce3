//! Owns lists: from the cache at its revision, or from the store at the revision that a page or a client names.

use super::options::{revision, wait_for_revision};
use super::output::{Tabler, partial};
use super::{Call, convert, shape};
use crate::accept::Shape;
use crate::api::store_failure;
use crate::body::Response;
use crate::cache::{Item, in_namespace};
use crate::reply;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64;
use bytes::Bytes;
use serde_json::{Value, json};
use std::sync::Arc;
use weft_control_api::selector::{FieldSelector, LabelSelector};
use weft_control_api::status::Status;
use weft_control_api::strategy;
use weft_control_store::{Range, Revision};

/// Keys read from the store at once when a page is filtered.
const STORE_PAGE: usize = 500;

/// Which objects of a resource are meant.
#[derive(Clone, Debug)]
pub(super) struct Selection {
    pub(super) namespace: String,
    /// The one object that the path names, for a watch.
    pub(super) name: Option<String>,
    pub(super) labels: LabelSelector,
    pub(super) fields: FieldSelector,
}

impl Selection {
    pub(super) fn of(call: &Call) -> Result<Self, Status> {
        let labels = LabelSelector::parse(call.query.get("labelSelector").unwrap_or_default())
            .map_err(|error| Status::bad_request(error.to_string()))?;
        let fields = FieldSelector::parse(call.query.get("fieldSelector").unwrap_or_default())
            .map_err(|error| Status::bad_request(error.to_string()))?;
        let this = Self {
            namespace: namespace(call),
            name: call.info.named.then(|| call.info.name.clone()),
            labels,
            fields,
        };
        this.check_fields(call)?;
        Ok(this)
    }

    fn check_fields(&self, call: &Call) -> Result<(), Status> {
        for requirement in self.fields.requirements() {
            let field = requirement.field.as_str();
            if !strategy::field_label_supported(call.kind, field) {
                let kind = call.kind;
                return Err(Status::bad_request(format!(
                    "Unable to find \"{}/{}, Resource={}\" that match label selector \"{}\", field selector \
                     \"{}\": field label not supported: {field}",
                    kind.group,
                    kind.version,
                    kind.plural,
                    call.query.get("labelSelector").unwrap_or_default(),
                    self.fields
                )));
            }
        }
        Ok(())
    }

    pub(super) fn is_everything(&self) -> bool {
        self.labels.is_everything() && self.fields.is_everything()
    }

    pub(super) fn matches(&self, item: &Item) -> bool {
        (self.namespace.is_empty() || item.namespace() == self.namespace)
            && self.name.as_ref().is_none_or(|name| item.name() == name)
            && self.labels.matches(&*item.labels)
            && self.fields.matches(&*item.fields)
    }
}

fn namespace(call: &Call) -> String {
    if call.kind.namespaced { call.info.namespace.clone() } else { String::new() }
}

/// One page.
struct Page {
    items: Vec<Arc<Item>>,
    revision: u64,
    /// The last key of the page, if there is more.
    last: Option<String>,
    remaining: Option<usize>,
}

/// Answers a list.
pub(super) async fn answer(call: &Call) -> Result<Response, Status> {
    let shape = shape(call)?;
    let selection = Selection::of(call)?;
    let limit = limit(call)?;
    let page = page(call, &selection, limit).await?;
    let mut metadata = json!({"resourceVersion": page.revision.to_string()});
    if let Some(last) = &page.last {
        metadata["continue"] = json!(token(page.revision, last));
        if let (Some(remaining), true) = (page.remaining, selection.is_everything()) {
            metadata["remainingItemCount"] = json!(remaining);
        }
    }
    render(call, shape, &page.items, &metadata)
}

/// All objects that a request selects, for what is done to each of them.
pub(super) async fn selected(call: &Call) -> Result<Vec<Arc<Item>>, Status> {
    let selection = Selection::of(call)?;
    Ok(page(call, &selection, usize::MAX).await?.items)
}

fn limit(call: &Call) -> Result<usize, Status> {
    match call.query.get("limit").map(str::parse::<i64>) {
        None => Ok(usize::MAX),
        Some(Ok(limit)) if limit > 0 => Ok(usize::try_from(limit).unwrap_or(usize::MAX)),
        Some(Ok(_)) => Ok(usize::MAX),
        Some(Err(error)) => Err(Status::bad_request(format!("invalid limit: {error}"))),
    }
}

async fn page(call: &Call, selection: &Selection, limit: usize) -> Result<Page, Status> {
    let version = call.query.get("resourceVersion");
    let mode = call.query.get("resourceVersionMatch");
    if let Some(token) = call.query.get("continue") {
        if version.is_some_and(|v| v != "0") {
            return Err(Status::bad_request(
                "specifying resource version is not allowed when using continue",
            ));
        }
        let (revision, last) = read_token(token)?;
        return stored_page(call, selection, limit, (revision, Some(last))).await;
    }
    match (version, mode) {
        (None, Some(_)) => {
            return Err(Status::bad_request(
                "resourceVersionMatch is forbidden unless resourceVersion is provided",
            ));
        }
        (Some("0"), Some("Exact")) => {
            return Err(Status::bad_request(
                "resourceVersionMatch \"exact\" is forbidden for resourceVersion \"0\"",
            ));
        }
        (Some(text), Some("Exact")) => {
            return stored_page(call, selection, limit, (revision(text)?, None)).await;
        }
        (_, Some(other)) if other != "NotOlderThan" => {
            return Err(Status::bad_request(format!(
                "resourceVersionMatch: Unsupported value: {other:?}: supported values: \"Exact\", \"NotOlderThan\""
            )));
        }
        (Some("0"), _) => {}
        (Some(text), _) => {
            wait_for_revision(&call.api, text).await?;
        }
        (None, None) => call.api.freshen().await?,
    }
    Ok(cached_page(call, selection, limit))
}

fn cached_page(call: &Call, selection: &Selection, limit: usize) -> Page {
    let snapshot = call.api.cache.snapshot(call.stored().id);
    let mut found = in_namespace(&snapshot.objects, &selection.namespace, None)
        .filter(|item| selection.matches(item))
        .cloned();
    let items: Vec<Arc<Item>> = found.by_ref().take(limit).collect();
    let remaining = found.count();
    let last = (remaining > 0).then(|| items.last().map(|item| item.key.to_string())).flatten();
    Page { items, revision: snapshot.revision, last, remaining: Some(remaining) }
}

/// A page at a revision of the past, after a key.
async fn stored_page(
    call: &Call,
    selection: &Selection,
    limit: usize,
    (revision, after): (u64, Option<String>),
) -> Result<Page, Status> {
    let resource = call.stored();
    let prefix =
        if selection.namespace.is_empty() { String::new() } else { format!("{}/", selection.namespace) };
    let mut range = Range::prefix(&resource.store_key(&prefix));
    if let Some(after) = after {
        range.start = format!("{}\0", resource.store_key(&after));
    }
    let mut items = Vec::new();
    loop {
        let read = limit.saturating_add(1).saturating_sub(items.len()).clamp(1, STORE_PAGE);
        let page =
            call.api.store.range(range.clone(), Revision(revision), read).await.map_err(store_failure)?;
        for kv in &page.items {
            let Some((_, key)) = call.api.resources.by_store_key(&kv.key) else { continue };
            let item = Item::decode(resource.storage, key, kv.mod_revision.0, &kv.value)
                .map_err(Status::internal)?;
            if selection.matches(&item) {
                items.push(Arc::new(item));
            }
        }
        match page.items.last() {
            Some(last) if page.more && items.len() <= limit => range.start = format!("{}\0", last.key),
            _ => break,
        }
    }
    let more = items.len() > limit;
    items.truncate(limit);
    let last = more.then(|| items.last().map(|item| item.key.to_string())).flatten();
    Ok(Page { items, revision, last, remaining: None })
}

fn token(revision: u64, last: &str) -> String {
    BASE64.encode(json!({"v": "meta.k8s.io/v1", "rv": revision, "start": format!("{last}\0")}).to_string())
}

fn read_token(token: &str) -> Result<(u64, String), Status> {
    let wrong = || Status::bad_request("continue key is not valid");
    let bytes = BASE64.decode(token.trim_end_matches('=')).map_err(|_ignored| wrong())?;
    let value: Value = serde_json::from_slice(&bytes).map_err(|_ignored| wrong())?;
    if value["v"] != "meta.k8s.io/v1" {
        return Err(wrong());
    }
    let revision = value["rv"].as_u64().filter(|r| *r > 0).ok_or_else(wrong)?;
    let start = value["start"].as_str().and_then(|s| s.strip_suffix('\0')).ok_or_else(wrong)?;
    Ok((revision, start.to_owned()))
}

fn render(call: &Call, shape: Shape, items: &[Arc<Item>], metadata: &Value) -> Result<Response, Status> {
    let (kind, storage) = (call.kind, call.stored().storage);
    let converted = || items.iter().map(|item| convert::bytes(item.json(), storage, kind));
    match shape {
        Shape::Table(version) => {
            let objects: Vec<Bytes> = converted().collect();
            let table = Tabler::new(call, version)?.table(objects.iter(), metadata, true);
            Ok(reply::json_pieces(vec![table], call.gzip))
        }
        Shape::Metadata => {
            let head = list_head("PartialObjectMetadataList", "meta.k8s.io/v1", metadata);
            Ok(reply::json_pieces(list_pieces(head, converted().map(|b| partial(&b))), call.gzip))
        }
        Shape::Object | Shape::Discovery(_) if std::ptr::eq(kind, storage) => {
            let head = list_head(&format!("{}List", kind.kind), &kind.api_version(), metadata);
            let mut pieces = Vec::with_capacity(items.len() + 2);
            pieces.push(head);
            for (index, item) in items.iter().enumerate() {
                pieces.push(if index == 0 { item.json() } else { item.json_after_comma() });
            }
            pieces.push(Bytes::from_static(b"]}\n"));
            Ok(reply::json_pieces(pieces, call.gzip))
        }
        Shape::Object | Shape::Discovery(_) => {
            let head = list_head(&format!("{}List", kind.kind), &kind.api_version(), metadata);
            Ok(reply::json_pieces(list_pieces(head, converted()), call.gzip))
        }
    }
}

/// The pieces of a list of these objects, given in the stored version.
pub(super) fn object_list(call: &Call, objects: Vec<Bytes>, metadata: &Value) -> Vec<Bytes> {
    let (kind, storage) = (call.kind, call.stored().storage);
    let head = list_head(&format!("{}List", kind.kind), &kind.api_version(), metadata);
    list_pieces(head, objects.into_iter().map(|json| convert::bytes(json, storage, kind)))
}

fn list_head(kind: &str, api_version: &str, metadata: &Value) -> Bytes {
    Bytes::from(format!(r#"{{"kind":"{kind}","apiVersion":"{api_version}","metadata":{metadata},"items":["#))
}

fn list_pieces(head: Bytes, objects: impl Iterator<Item = Bytes>) -> Vec<Bytes> {
    let mut pieces = vec![head];
    for (index, object) in objects.enumerate() {
        if index > 0 {
            pieces.push(Bytes::from_static(b","));
        }
        pieces.push(object);
    }
    pieces.push(Bytes::from_static(b"]}\n"));
    pieces
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens() {
        assert_eq!(read_token(&token(7, "default/a")).unwrap(), (7, "default/a".to_owned()));
        assert_eq!(read_token("x").unwrap_err().code(), 400);
    }
}
