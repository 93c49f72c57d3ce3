//! What clients of the API send: bodies, patches, selectors, names and numbers, request lines.

use http::Method;
use jiff::Timestamp;
use serde_json::{Value, json};
use weft_agent_kubelet::fuzz::quantity_milli;
use weft_control_api::codec::{self, FieldValidation};
use weft_control_api::intstr::IntOrString;
use weft_control_api::kinds::{self, Kind};
use weft_control_api::patch::{PatchType, apply, apply_and_decode};
use weft_control_api::quantity::{Format, Quantity};
use weft_control_api::selector::{FieldSelector, LabelSelector};
use weft_control_api::{names, protobuf, strategy, table, timestamp};

/// The kind that the first line names (`apps/v1 Deployment`), or any; and the rest.
fn kind_of(bytes: &[u8]) -> (&'static Kind, &[u8]) {
    let end = bytes.iter().position(|byte| *byte == b'\n').unwrap_or(0);
    let (line, rest) = bytes.split_at(end);
    let rest = rest.get(1..).unwrap_or_default();
    let named = std::str::from_utf8(line).ok().and_then(|line| {
        let (version, kind) = line.split_once(' ')?;
        let (group, version) = version.split_once('/').unwrap_or(("", version));
        kinds::by_gvk(group, version, kind).filter(|kind| kind.definition.is_some())
    });
    let any = || {
        let all: Vec<_> = kinds::served().filter(|kind| kind.definition.is_some()).collect();
        all[usize::from(bytes.first().copied().unwrap_or(0)) % all.len()]
    };
    (named.unwrap_or_else(any), rest)
}

/// What the API server does with an object that it could read. Every step is total.
fn judge(kind: &'static Kind, mut object: Value) {
    let again = codec::decode_value(kind, object.clone(), FieldValidation::Strict);
    assert_eq!(again.map(|decoded| decoded.object).as_ref(), Ok(&object), "the canonical form is one");
    strategy::default(kind, &mut object);
    let mut twice = object.clone();
    strategy::default(kind, &mut twice);
    assert_eq!(twice, object, "defaults are set once");
    let context = strategy::Context {
        username: "jane",
        uid: "u",
        groups: &[],
        extra: &Value::Null,
        now: Timestamp::UNIX_EPOCH,
    };
    let old = object.clone();
    strategy::prepare_create(kind, &mut object, &context);
    strategy::validate_create(kind, &object);
    for subresource in [None, Some("status"), Some("scale")] {
        let mut new = object.clone();
        strategy::prepare_update(kind, subresource, &mut new, &old);
        strategy::validate_update(kind, subresource, &new, &old);
    }
    strategy::warnings(kind, &object);
    strategy::selectable_fields(kind, &object);
    assert_eq!(table::row(kind, &object, Timestamp::UNIX_EPOCH).len(), table::columns(kind).len());
    table::conditions(kind, &object);
    let scale = strategy::scale_get(kind, &object);
    strategy::scale_set(kind, &mut object, &scale);
    let _selector = LabelSelector::from_value(object.pointer("/spec/selector"));
}

fn body(bytes: &[u8], media_type: &str) {
    let (kind, text) = kind_of(bytes);
    let strict = codec::decode(kind, media_type, text, FieldValidation::Strict);
    let lax = codec::decode(kind, media_type, text, FieldValidation::Ignore);
    let warned = codec::decode(kind, media_type, text, FieldValidation::Warn);
    assert_eq!(lax.is_ok(), warned.is_ok(), "what is unknown is no failure");
    if let Err(status) = &strict {
        assert!([400, 500].contains(&status.code()), "{status:?}");
    }
    let Ok(lax) = lax else {
        assert!(strict.is_err());
        return;
    };
    if let Ok(strict) = strict {
        assert_eq!(strict.object, lax.object);
    }
    let json = lax.object.to_string();
    let again = codec::decode(kind, "application/json", json.as_bytes(), FieldValidation::Strict);
    assert_eq!(again.map(|decoded| decoded.object).as_ref(), Ok(&lax.object), "written and read again");
    judge(kind, lax.object);
}

/// A JSON body behind a line that names its kind.
pub(crate) fn json(bytes: &[u8]) {
    body(bytes, "application/json");
}

/// A YAML body behind a line that names its kind.
pub(crate) fn yaml(bytes: &[u8]) {
    body(bytes, "application/yaml");
}

/// A protobuf body.
pub(crate) fn protobuf(bytes: &[u8]) {
    let Ok(object) = protobuf::read(bytes) else { return };
    let text = |key: &str| object[key].as_str().unwrap_or_default().to_owned();
    let (version, name) = (text("apiVersion"), text("kind"));
    let (group, version) = version.split_once('/').unwrap_or(("", &version));
    let Some(kind) = kinds::by_gvk(group, version, &name).filter(|kind| kind.definition.is_some()) else {
        return;
    };
    if let Ok(decoded) = codec::decode_value(kind, object, FieldValidation::Ignore) {
        judge(kind, decoded.object);
    }
}

/// The kind, a line with the present object, the rest a patch; each kind of patch is tried.
pub(crate) fn patch(bytes: &[u8]) {
    let (kind, rest) = kind_of(bytes);
    let end = rest.iter().position(|byte| *byte == b'\n').unwrap_or(rest.len());
    let (current, patch) = rest.split_at(end);
    let patch = patch.get(1..).unwrap_or_default();
    let read = codec::decode(kind, "application/json", current, FieldValidation::Ignore);
    let Ok(current) = read.map(|decoded| decoded.object) else { return };
    for patch_type in [PatchType::Json, PatchType::Merge, PatchType::Strategic] {
        let nothing: &[u8] = if patch_type == PatchType::Json { b"[]" } else { b"{}" };
        assert_eq!(apply(kind, patch_type, &current, nothing).as_ref(), Ok(&current), "{patch_type:?}");
        let patched = apply_and_decode(kind, patch_type, &current, patch, FieldValidation::Ignore);
        let Ok(patched) = patched else { continue };
        if patch_type == PatchType::Merge {
            let again = apply_and_decode(kind, patch_type, &patched.object, patch, FieldValidation::Ignore);
            assert_eq!(again.map(|again| again.object).as_ref(), Ok(&patched.object), "merged twice");
        }
        judge(kind, patched.object);
    }
}

/// Selectors of labels and fields.
pub(crate) fn selector(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let labels = vec![("app", "web"), ("tier", "9"), ("a", "")];
    if let Ok(selector) = LabelSelector::parse(text) {
        let again = LabelSelector::parse(&selector.to_string());
        assert_eq!(again.as_ref(), Ok(&selector), "written and read again");
        let all = selector.requirements().iter().all(|requirement| requirement.matches(&labels));
        assert_eq!(selector.matches(&labels), all);
    }
    if let Ok(selector) = FieldSelector::parse(text) {
        assert_eq!(FieldSelector::parse(&selector.to_string()).as_ref(), Ok(&selector));
        selector.matches(&labels);
    }
    if let Ok(value) = serde_json::from_slice::<Value>(bytes)
        && let Ok(selector) = LabelSelector::from_value(Some(&value))
    {
        selector.matches(&labels);
    }
}

/// Quantities, times, names and the like.
pub(crate) fn text(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    quantity(text);
    if let Ok(time) = timestamp::parse(text) {
        let second = timestamp::parse(&timestamp::seconds(time)).expect("what is written can be read");
        assert!(second <= time && second.as_second() == time.as_second().min(second.as_second()));
        assert!(timestamp::parse(&timestamp::micros(time)).is_ok());
    }
    let percentage = IntOrString::from_value(&json!(text));
    if let Some(value) = percentage {
        for total in [0, 1, 7, i32::MAX, i32::MIN] {
            if let (Ok(up), Ok(down)) = (value.scaled(total, true), value.scaled(total, false)) {
                assert!(up >= down && i64::from(up) - i64::from(down) <= 1);
            }
        }
        value.percentage();
    }
    let checks = [
        names::dns1123_label,
        names::dns1123_subdomain,
        names::dns1035_label,
        names::wildcard_dns1123_subdomain,
        names::qualified_name,
        names::label_value,
        names::env_var_name,
        names::config_map_key,
        names::path_segment,
        names::port_name,
        names::ip,
        names::cidr,
        names::strict_cidr,
        names::canonical_ip,
        names::percent,
        names::http_header_name,
    ];
    for check in checks {
        check(text);
    }
    if names::dns1035_label(text).is_empty() {
        assert!(names::dns1123_label(text).is_empty() && names::dns1123_subdomain(text).is_empty());
    }
    if names::strict_cidr(text).is_empty() {
        assert!(names::cidr(text).is_empty(), "{text:?}");
    }
    if names::canonical_ip(text).is_empty() {
        assert!(names::ip(text).is_empty(), "{text:?}");
    }
}

fn quantity(text: &str) {
    let known = quantity_milli(text);
    let Ok(quantity) = text.parse::<Quantity>() else {
        assert_eq!(known, None, "the kubelet reads a quantity that the API refuses");
        return;
    };
    let written = quantity.to_string();
    let again: Quantity = written.parse().expect("what is written can be read");
    assert_eq!((again, again.to_string()), (quantity, written));
    let Some(known) = known.and_then(|milli| i64::try_from(milli).ok()) else { return };
    // Less than a byte is one to the API, and it rounds up where the kubelet rounds away from zero; neither is ever stored.
    let usual = quantity.signum() >= 0 && (quantity.format() != Format::BinarySi || known >= 1000);
    if usual && quantity.millis() < i64::MAX {
        let apart = known.abs_diff(quantity.millis());
        assert!(apart <= 1, "{known} and {}", quantity.millis());
    }
}

/// A request line: method, path, query.
pub(crate) fn request(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let mut words = text.splitn(2, ' ');
    let method = words.next().and_then(|word| Method::from_bytes(word.as_bytes()).ok());
    let target = words.next().unwrap_or_default();
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    weft_control_apiserver::fuzz::request(&method.unwrap_or(Method::GET), path, query);
    FieldValidation::parse(query);
    PatchType::from_media_type(query);
}
