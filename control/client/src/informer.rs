//! Owns the list-then-watch loop and the indexed, shared object cache it feeds.
//!
//! States of the loop: `List` → `Watch(rv)` → (stream ends or breaks) `Watch(rv)` → (410) `List`. Every failure
//! waits for the loop's back-off; a stream that ends normally is reopened at once.

use crate::{Class, ObjectKey, classify};
use futures::{StreamExt, future::BoxFuture, stream::BoxStream};
use kube::api::{Api, ListParams, WatchEvent, WatchParams};
use kube::core::{DynamicObject, ObjectList, PartialObjectMeta};
use kube::{Resource, ResourceExt};
use parking_lot::RwLock;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt::Debug;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

const BACKOFF_FIRST: Duration = Duration::from_millis(50);
/// Upstream's reflector waits at most 30 s between attempts.
const BACKOFF_MAX: Duration = Duration::from_secs(30);
/// The API server ends a watch after this; below upstream's minimum request timeout and kube's ceiling of 295 s.
const WATCH_TIMEOUT_SECONDS: u32 = 290;

/// Where objects come from.
pub trait Source<K: Clone>: Send + Sync {
    /// All objects now.
    fn list(&self, params: ListParams) -> BoxFuture<'_, kube::Result<ObjectList<K>>>;
    /// Changes after a resource version.
    fn watch(
        &self,
        params: WatchParams,
        version: String,
    ) -> BoxFuture<'_, kube::Result<BoxStream<'static, kube::Result<WatchEvent<K>>>>>;
}

/// Whole objects of a typed kind.
pub struct Objects<K>(pub Api<K>);

impl<K> Source<K> for Objects<K>
where
    K: Resource + Clone + serde::de::DeserializeOwned + Debug + Send + Sync + 'static,
{
    fn list(&self, params: ListParams) -> BoxFuture<'_, kube::Result<ObjectList<K>>> {
        Box::pin(async move { self.0.list(&params).await })
    }

    fn watch(
        &self,
        params: WatchParams,
        version: String,
    ) -> BoxFuture<'_, kube::Result<BoxStream<'static, kube::Result<WatchEvent<K>>>>> {
        Box::pin(async move { Ok(self.0.watch(&params, &version).await?.boxed()) })
    }
}

/// Metadata alone, of any kind.
pub struct Metadata(pub Api<DynamicObject>);

impl Source<PartialObjectMeta> for Metadata {
    fn list(&self, params: ListParams) -> BoxFuture<'_, kube::Result<ObjectList<PartialObjectMeta>>> {
        Box::pin(async move { self.0.list_metadata(&params).await })
    }

    fn watch(
        &self,
        params: WatchParams,
        version: String,
    ) -> BoxFuture<'_, kube::Result<BoxStream<'static, kube::Result<WatchEvent<PartialObjectMeta>>>>> {
        Box::pin(async move { Ok(self.0.watch_metadata(&params, &version).await?.boxed()) })
    }
}

/// Where objects go to.
pub trait Sink<K>: Send + Sync {
    /// The complete state; what is not in it is gone.
    fn replace(&self, objects: Vec<K>);
    /// Added or changed.
    fn applied(&self, object: K);
    /// Deleted, with its last state.
    fn deleted(&self, object: K);
}

/// Which objects to follow.
#[derive(Clone, Debug, Default)]
pub struct Selection {
    /// Field selector.
    pub fields: Option<String>,
    /// Label selector.
    pub labels: Option<String>,
}

/// Follows a source into a sink until `shutdown`.
pub async fn follow<K>(
    source: &dyn Source<K>,
    sink: &dyn Sink<K>,
    selection: &Selection,
    shutdown: &CancellationToken,
) where
    K: Resource + Clone + Send + Sync + 'static,
{
    let stopped = shutdown.cancelled();
    tokio::select! {
        () = stopped => {}
        () = follow_forever(source, sink, selection) => {}
    }
}

async fn follow_forever<K: Resource + Clone>(
    source: &dyn Source<K>,
    sink: &dyn Sink<K>,
    selection: &Selection,
) {
    let mut backoff = BACKOFF_FIRST;
    loop {
        // "any" lets the server answer from its cache, as upstream's reflectors ask for.
        let params = ListParams {
            field_selector: selection.fields.clone(),
            label_selector: selection.labels.clone(),
            ..ListParams::default().match_any()
        };
        match source.list(params).await {
            Ok(list) => {
                let version = list.metadata.resource_version.unwrap_or_default();
                sink.replace(list.items);
                backoff = BACKOFF_FIRST;
                watch_until_expired(source, sink, selection, version).await;
            }
            Err(error) => {
                tracing::warn!(error = %crate::Chain(&error), kind = kind::<K>(), "cannot list; trying again");
                sleep_with_jitter(&mut backoff).await;
            }
        }
    }
}

/// Watches, reopening the stream as long as the server still knows the version.
async fn watch_until_expired<K: Resource + Clone>(
    source: &dyn Source<K>,
    sink: &dyn Sink<K>,
    selection: &Selection,
    mut version: String,
) {
    let mut backoff = BACKOFF_FIRST;
    loop {
        let params = WatchParams {
            field_selector: selection.fields.clone(),
            label_selector: selection.labels.clone(),
            timeout: Some(WATCH_TIMEOUT_SECONDS),
            ..WatchParams::default()
        };
        let ended = match source.watch(params, version.clone()).await {
            Ok(stream) => drain(stream, sink, &mut version, &mut backoff).await,
            Err(error) => Err(error),
        };
        match ended {
            Ok(()) => {}
            Err(error) if classify(&error) == Class::Expired => return,
            Err(error) => {
                tracing::debug!(%error, "watch broke; opening it again");
                sleep_with_jitter(&mut backoff).await;
            }
        }
    }
}

async fn drain<K: Resource + Clone>(
    mut stream: BoxStream<'static, kube::Result<WatchEvent<K>>>,
    sink: &dyn Sink<K>,
    version: &mut String,
    backoff: &mut Duration,
) -> kube::Result<()> {
    let mut any = false;
    while let Some(event) = stream.next().await {
        any = true;
        let event = match event {
            Ok(event) => event,
            Err(error) if classify(&error) == Class::Expired => return Err(error),
            // An event that can't be read must not keep those behind it from everybody, and would come again in every stream opened
            // at the version before it. A stream that broke ends by itself.
            Err(error) => {
                tracing::warn!(error = %crate::Chain(&error), kind = kind::<K>(), "cannot read an event; it is left out");
                continue;
            }
        };
        *backoff = BACKOFF_FIRST;
        let mut seen = |object: &K| {
            if let Some(rv) = &object.meta().resource_version {
                version.clone_from(rv);
            }
        };
        match event {
            WatchEvent::Added(object) | WatchEvent::Modified(object) => {
                seen(&object);
                sink.applied(object);
            }
            WatchEvent::Deleted(object) => {
                seen(&object);
                sink.deleted(object);
            }
            WatchEvent::Bookmark(mark) => *version = mark.metadata.resource_version,
            WatchEvent::Error(status) => return Err(kube::Error::Api(status)),
        }
    }
    if !any {
        // A server that accepts a watch and ends it at once must not be asked in a tight loop.
        sleep_with_jitter(backoff).await;
    }
    Ok(())
}

fn kind<K>() -> &'static str {
    std::any::type_name::<K>().rsplit("::").next().unwrap_or_default()
}

async fn sleep_with_jitter(backoff: &mut Duration) {
    let jitter = rand::random_range(0.75..1.25);
    tokio::time::sleep(backoff.mul_f64(jitter)).await;
    *backoff = (*backoff * 2).min(BACKOFF_MAX);
}

/// A change that a cache has taken over.
#[derive(Clone, Debug)]
pub enum Change<K> {
    /// New, or changed from `old`.
    Applied {
        /// The state before, if the object was known.
        old: Option<Arc<K>>,
        /// The state now.
        new: Arc<K>,
    },
    /// Gone; the last known state.
    Deleted(Arc<K>),
}

impl<K> Change<K> {
    /// The newest state that the change tells of.
    pub fn object(&self) -> &Arc<K> {
        match self {
            Self::Applied { new, .. } => new,
            Self::Deleted(object) => object,
        }
    }
}

type Handler<K> = Box<dyn Fn(&Change<K>) + Send + Sync>;
type Indexer<K> = fn(&K) -> Option<String>;

struct State<K> {
    objects: BTreeMap<ObjectKey, Arc<K>>,
    indexes: Vec<HashMap<String, BTreeSet<ObjectKey>>>,
}

/// A cache of one kind, shared by everything that reads it. Handlers run after the cache has the change, in order.
pub struct Informer<K> {
    state: RwLock<State<K>>,
    handlers: RwLock<Vec<Handler<K>>>,
    trim: fn(&mut K),
    indexers: Vec<(&'static str, Indexer<K>)>,
    synced: watch::Sender<bool>,
}

impl<K> Informer<K>
where
    K: Resource<DynamicType = ()> + Clone + Debug + Send + Sync + 'static,
{
    /// An empty cache. `trim` drops what no reader needs; each indexer groups objects by one string.
    pub fn new(trim: fn(&mut K), indexers: Vec<(&'static str, Indexer<K>)>) -> Arc<Self> {
        let indexes = indexers.iter().map(|_| HashMap::new()).collect();
        Arc::new(Self {
            state: RwLock::new(State { objects: BTreeMap::new(), indexes }),
            handlers: RwLock::new(Vec::new()),
            trim,
            indexers,
            synced: watch::Sender::new(false),
        })
    }

    /// Calls `handler` on every change from now on. It must not block.
    pub fn on_change(&self, handler: impl Fn(&Change<K>) + Send + Sync + 'static) {
        self.handlers.write().push(Box::new(handler));
    }

    /// As [`on_change`](Self::on_change), for an `owner` that itself holds this cache: it is held weakly, and told while it lives.
    pub fn on_change_for<C>(&self, owner: &Arc<C>, handler: impl Fn(&C, &Change<K>) + Send + Sync + 'static)
    where
        C: Send + Sync + 'static,
    {
        let owner = Arc::downgrade(owner);
        self.on_change(move |change| {
            if let Some(owner) = owner.upgrade() {
                handler(&owner, change);
            }
        });
    }

    /// Fills the cache from the API until `shutdown`.
    pub async fn run(&self, api: Api<K>, selection: Selection, shutdown: CancellationToken)
    where
        K: serde::de::DeserializeOwned,
    {
        follow(&Objects(api), self, &selection, &shutdown).await;
        // Who still waits for the first list must come to see the shutdown.
        self.synced.send_replace(true);
    }

    /// Returns once the first list is in the cache, or the informer has stopped.
    pub async fn synced(&self) {
        // The sender lives in self, so waiting can't fail.
        let _ = self.synced.subscribe().wait_for(|synced| *synced).await;
    }

    /// One object.
    pub fn get(&self, namespace: &str, name: &str) -> Option<Arc<K>> {
        self.by_key(&ObjectKey::new(namespace, name))
    }

    /// One object.
    pub fn by_key(&self, key: &ObjectKey) -> Option<Arc<K>> {
        self.state.read().objects.get(key).cloned()
    }

    /// All objects.
    pub fn list(&self) -> Vec<Arc<K>> {
        self.state.read().objects.values().cloned().collect()
    }

    /// How many objects there are.
    pub fn len(&self) -> usize {
        self.state.read().objects.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The objects of a namespace, by name.
    pub fn in_namespace(&self, namespace: &str) -> Vec<Arc<K>> {
        let state = self.state.read();
        state
            .objects
            .range(ObjectKey::new(namespace, "")..)
            .take_while(|(key, _)| &*key.namespace == namespace)
            .map(|(_, object)| object.clone())
            .collect()
    }

    /// The objects whose indexer `index` yields `value`.
    ///
    /// # Panics
    /// When the informer was made without an index of that name.
    pub fn by_index(&self, index: &str, value: &str) -> Vec<Arc<K>> {
        let at = self.indexers.iter().position(|(name, _)| *name == index);
        let at = at.expect("the index is declared where the informer is made");
        let state = self.state.read();
        let keys = state.indexes[at].get(value);
        keys.into_iter().flatten().filter_map(|key| state.objects.get(key).cloned()).collect()
    }

    fn insert(&self, state: &mut State<K>, mut object: K) -> Change<K> {
        object.meta_mut().managed_fields = None;
        (self.trim)(&mut object);
        let key = ObjectKey::of(object.meta());
        let new = Arc::new(object);
        let old = state.objects.insert(key.clone(), new.clone());
        for ((_, indexer), index) in self.indexers.iter().zip(&mut state.indexes) {
            let (before, after) = (old.as_ref().and_then(|o| indexer(o)), indexer(&new));
            if before == after {
                continue;
            }
            unindex(index, before, &key);
            if let Some(value) = after {
                index.entry(value).or_default().insert(key.clone());
            }
        }
        Change::Applied { old, new }
    }

    fn remove(&self, state: &mut State<K>, key: &ObjectKey) -> Option<Change<K>> {
        let old = state.objects.remove(key)?;
        for ((_, indexer), index) in self.indexers.iter().zip(&mut state.indexes) {
            unindex(index, indexer(&old), key);
        }
        Some(Change::Deleted(old))
    }

    fn tell(&self, changes: &[Change<K>]) {
        let handlers = self.handlers.read();
        for change in changes {
            handlers.iter().for_each(|handler| handler(change));
        }
    }
}

fn unindex(index: &mut HashMap<String, BTreeSet<ObjectKey>>, value: Option<String>, key: &ObjectKey) {
    let Some(value) = value else { return };
    if let Some(keys) = index.get_mut(&value) {
        keys.remove(key);
        if keys.is_empty() {
            index.remove(&value);
        }
    }
}

impl<K> Sink<K> for Informer<K>
where
    K: Resource<DynamicType = ()> + Clone + Debug + Send + Sync + 'static,
{
    fn replace(&self, objects: Vec<K>) {
        let mut changes = Vec::new();
        {
            let mut state = self.state.write();
            let keep: BTreeSet<ObjectKey> = objects.iter().map(|o| ObjectKey::of(o.meta())).collect();
            let gone: Vec<_> = state.objects.keys().filter(|key| !keep.contains(*key)).cloned().collect();
            changes.extend(gone.iter().filter_map(|key| self.remove(&mut state, key)));
            changes.extend(objects.into_iter().map(|object| self.insert(&mut state, object)));
        }
        self.tell(&changes);
        self.synced.send_replace(true);
    }

    fn applied(&self, object: K) {
        let change = self.insert(&mut self.state.write(), object);
        self.tell(&[change]);
    }

    fn deleted(&self, object: K) {
        // The last state from the server is newer than the cached one (deletionTimestamp, final status).
        let key = ObjectKey::new(object.namespace().as_deref().unwrap_or_default(), &object.name_any());
        let change = {
            let mut state = self.state.write();
            self.insert(&mut state, object);
            self.remove(&mut state, &key)
        };
        self.tell(change.as_slice());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::api::core::v1::{Pod, PodSpec};
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
    use parking_lot::Mutex;

    fn pod(namespace: &str, name: &str, node: Option<&str>) -> Pod {
        Pod {
            metadata: ObjectMeta {
                namespace: Some(namespace.into()),
                name: Some(name.into()),
                ..ObjectMeta::default()
            },
            spec: Some(PodSpec { node_name: node.map(Into::into), ..PodSpec::default() }),
            status: None,
        }
    }

    fn by_node(pod: &Pod) -> Option<String> {
        pod.spec.as_ref()?.node_name.clone()
    }

    fn names(pods: &[Arc<Pod>]) -> Vec<String> {
        pods.iter().map(|p| p.name_any()).collect()
    }

    #[test]
    fn indexes_follow_changes_and_deletes() {
        let informer = Informer::<Pod>::new(|_| {}, vec![("node", by_node)]);
        informer.applied(pod("a", "one", None));
        assert!(informer.by_index("node", "n1").is_empty());
        informer.applied(pod("a", "one", Some("n1")));
        informer.applied(pod("b", "two", Some("n1")));
        assert_eq!(names(&informer.by_index("node", "n1")), ["one", "two"]);
        assert_eq!(names(&informer.in_namespace("b")), ["two"]);
        informer.deleted(pod("a", "one", Some("n1")));
        assert_eq!(names(&informer.by_index("node", "n1")), ["two"]);
        assert!(informer.get("a", "one").is_none());
    }

    #[test]
    fn a_new_list_tells_what_is_gone() {
        let informer = Informer::<Pod>::new(|_| {}, vec![]);
        let seen = Arc::new(Mutex::new(Vec::new()));
        let log = seen.clone();
        informer.on_change(move |change| {
            log.lock().push(match change {
                Change::Applied { old: None, new } => format!("+{}", new.name_any()),
                Change::Applied { old: Some(_), new } => format!("~{}", new.name_any()),
                Change::Deleted(old) => format!("-{}", old.name_any()),
            });
        });
        informer.replace(vec![pod("a", "one", None), pod("a", "two", None)]);
        informer.replace(vec![pod("a", "two", None), pod("a", "three", None)]);
        assert_eq!(*seen.lock(), ["+one", "+two", "-one", "~two", "+three"]);
    }

    #[tokio::test]
    async fn an_event_that_cannot_be_read_keeps_none_back() {
        let informer = Informer::<Pod>::new(|_| {}, vec![]);
        let unreadable = |text| Err(kube::Error::SerdeError(serde_json::from_str::<Pod>(text).unwrap_err()));
        let mut two = pod("a", "two", None);
        two.metadata.resource_version = Some("7".into());
        let events = [
            Ok(WatchEvent::Added(pod("a", "one", None))),
            unreadable(r#"{"metadata": 1}"#),
            // What kube makes of a line that is no event of this kind.
            Err(kube::Error::Api(Box::default())),
            Ok(WatchEvent::Added(two)),
        ];
        let (mut version, mut backoff) = ("1".to_owned(), BACKOFF_FIRST);
        let stream = futures::stream::iter(events).boxed();
        drain(stream, &*informer, &mut version, &mut backoff).await.unwrap();
        assert_eq!(names(&informer.list()), ["one", "two"]);
        assert_eq!(version, "7");

        let expired = kube::core::Status::failure("too old", "Expired").with_code(410);
        let events = [Err(kube::Error::Api(expired.boxed())), Ok(WatchEvent::Added(pod("a", "three", None)))];
        let stream = futures::stream::iter(events).boxed();
        assert!(drain(stream, &*informer, &mut version, &mut backoff).await.is_err());
        assert_eq!(informer.len(), 2);
    }

    #[tokio::test]
    async fn nobody_waits_for_an_informer_that_was_stopped_before_its_first_list() {
        let informer = Informer::<Pod>::new(|_| {}, vec![]);
        let shutdown = CancellationToken::new();
        shutdown.cancel();
        informer.run(Api::all(unanswered()), Selection::default(), shutdown).await;
        informer.synced().await;
        assert!(informer.is_empty());
    }

    /// A client whose server doesn't answer.
    fn unanswered() -> kube::Client {
        let config = kube::Config::new("http://127.0.0.1:1".parse().unwrap());
        kube::Client::try_from(config).unwrap()
    }

    #[tokio::test]
    async fn is_synced_after_the_first_list_even_when_it_is_empty() {
        let informer = Informer::<Pod>::new(|_| {}, vec![]);
        assert!(!*informer.synced.borrow());
        informer.replace(vec![]);
        informer.synced().await;
    }
}
