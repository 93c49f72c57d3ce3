use super::*;
use serde_json::json;
use weft_control_store::{Event, KeyValue, Revision};

fn cache() -> Cache {
    Cache::new(Arc::new(Resources::new()))
}

fn put(key: &str, revision: u64, label: &str) -> Event {
    let name = key.rsplit('/').next().unwrap();
    let object = json!({"apiVersion": "v1", "kind": "ConfigMap", "data": {"a": "b"},
        "metadata": {"name": name, "namespace": "default", "labels": {"x": label}, "uid": "u"}});
    let kv = KeyValue {
        key: key.to_owned(),
        value: object_value_bytes(&object),
        create_revision: Revision(1),
        mod_revision: Revision(revision),
    };
    Event::Put { kv, prev: None }
}

fn delete(key: &str, revision: u64) -> Event {
    Event::Delete { key: key.to_owned(), revision: Revision(revision), prev: None }
}

fn config_maps(cache: &Cache) -> usize {
    cache.resources().by_plural("", "configmaps").unwrap().id
}

const A: &str = "/registry/configmaps/default/a";

#[test]
fn items_are_final_json() {
    let cache = cache();
    let id = config_maps(&cache);
    cache.apply(7, &[put(A, 7, "1")]);
    let item = cache.get(id, "default/a").unwrap();
    let value: serde_json::Value = serde_json::from_slice(&item.json()).unwrap();
    assert_eq!(value["metadata"]["resourceVersion"], "7");
    assert_eq!(value["data"]["a"], "b");
    assert_eq!(
        (item.namespace(), item.name(), &*item.uid, item.labels.first().map(|(_, v)| &**v)),
        ("default", "a", "u", Some("1"))
    );
    assert_eq!(item.json_after_comma()[0], b',');
    assert!(item.event_tail().ends_with(b"}}\n"));
    assert_eq!(item.at_revision(1234).parse()["metadata"]["resourceVersion"], "1234");
    assert_eq!(json_with_revision(&object_value_bytes(&value), 7), item.json());
}

#[test]
fn changes_resume_and_expire() {
    let cache = cache();
    let id = config_maps(&cache);
    cache.apply(1, &[put(A, 1, "1")]);
    cache.apply(2, &[put(A, 2, "2")]);
    cache.apply(3, &[delete(A, 3)]);
    // Of no resource: only the revision moves.
    cache.apply(4, &[]);
    let Resume::Changes(changes, revision) = cache.changes_after(id, 1) else { panic!("expired") };
    assert_eq!(revision, 4);
    assert_eq!(changes.iter().map(|c| (c.revision, c.deleted)).collect::<Vec<_>>(), [(2, false), (3, true)]);
    assert_eq!(changes[1].item.revision, 3);
    assert!(changes[0].previous.as_ref().is_some_and(|p| p.revision == 1));
    assert_eq!(cache.count(id), 0);
    for revision in 5..5 + MAX_CHANGES as u64 + 10 {
        cache.apply(revision, &[put(A, revision, "1")]);
    }
    assert!(matches!(cache.changes_after(id, 4), Resume::Expired(_)));
    assert!(matches!(cache.changes_after(id, cache.revision()), Resume::Changes(c, _) if c.is_empty()));
}

#[test]
fn snapshots_stand_still() {
    let cache = cache();
    let id = config_maps(&cache);
    cache.apply(1, &[put(A, 1, "1")]);
    let before = cache.snapshot(id);
    cache.apply(2, &[delete(A, 2)]);
    assert_eq!((before.revision, before.objects.size()), (1, 1));
    assert_eq!(cache.snapshot(id).objects.size(), 0);
}

#[test]
fn namespaces_are_ranges() {
    let cache = cache();
    let id = config_maps(&cache);
    let keys = ["a-b/x", "a/x", "a/y", "b/x"];
    for (revision, key) in (1..).zip(keys) {
        cache.apply(revision, &[put(&format!("/registry/configmaps/{key}"), revision, "1")]);
    }
    let objects = cache.snapshot(id).objects;
    let names = |namespace, after| -> Vec<String> {
        in_namespace(&objects, namespace, after).map(|item| item.key.to_string()).collect()
    };
    assert_eq!(names("a", None), ["a/x", "a/y"]);
    assert_eq!(names("a", Some("a/x")), ["a/y"]);
    assert_eq!(names("", None).len(), 4);
}
