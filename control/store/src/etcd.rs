//! The store in an etcd cluster: the same contract over etcd's v3 API, below a prefix, with TLS.
//!
//! etcd's own semantics are the contract's, so most of this is translation. What isn't: watches are opened again after a
//! disconnection (`watch`), long ranges are read in pages at one revision, and errors are told apart by status code and
//! revision, never by their text.

#[cfg(test)]
mod tests;
mod watch;

use std::time::Duration;

use bytes::Bytes;
use etcd_client::{
    Client, Compare, CompareOp, ConnectOptions, GetOptions, KvClient, Txn, TxnOp, TxnOpResponse,
};

use crate::limits::{check_key, check_txn};
use crate::{Condition, Error, KeyValue, Op, Page, Range, Revision, Store, TxnOutcome, Watch};

/// How long one call may take, so that a lost server is an error and not a hang.
const CALL_TIMEOUT: Duration = Duration::from_secs(10);

/// How often an idle connection is probed, and how long the answer may take.
const KEEP_ALIVE: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(5));

/// Keys of one page. Bounds the size of a message: 500 objects of etcd's largest size would be 750 MiB, of the usual size 2 MiB.
const PAGE: i64 = 500;

/// gRPC's own bound on a message (4 MiB) is too low for a page; etcd bounds what it sends by what it stores.
const MESSAGE_BYTES: usize = 1 << 30;

/// gRPC's status code for a revision that is compacted, or not there yet.
const OUT_OF_RANGE: i32 = 11;
/// gRPC's status code for a request that the server will never take, such as one over its size limit.
const INVALID_ARGUMENT: i32 = 3;

/// How to speak TLS with etcd. All of it is PEM.
#[derive(Clone, Debug, Default)]
pub struct TlsOptions {
    /// The authorities that may have signed the servers' certificates.
    pub ca: Vec<u8>,
    /// Our certificate and its key, if the servers want one.
    pub client: Option<(Vec<u8>, Vec<u8>)>,
    /// The name that the servers' certificates must hold, if it isn't the endpoint's.
    pub server_name: Option<String>,
}

/// A store in an etcd cluster.
pub struct EtcdStore {
    client: Client,
    kv: KvClient,
    /// Put before every key; what lies outside it isn't ours.
    prefix: String,
    /// Whether idle watches may ask how far they are.
    ask_progress: bool,
}

impl EtcdStore {
    /// Connects to a cluster by the URLs of its members and asks one of them for its version.
    /// All keys lie below `prefix` there (empty: none).
    pub async fn connect(endpoints: &[String], tls: Option<TlsOptions>, prefix: &str) -> Result<Self, Error> {
        let mut options = ConnectOptions::new()
            .with_connect_timeout(CALL_TIMEOUT)
            .with_keep_alive(KEEP_ALIVE.0, KEEP_ALIVE.1)
            .with_keep_alive_while_idle(true)
            .with_require_leader(true);
        if let Some(tls) = tls {
            options = options.with_tls(client_tls(tls));
        }
        let during = "connecting to etcd";
        let connect = Client::connect(endpoints, Some(options));
        let mut client = connect.await.map_err(|error| failed(during, error))?;
        let status = bounded(during, client.status()).await?;
        let kv = client.kv_client().max_decoding_message_size(MESSAGE_BYTES);
        let ask_progress = watch::progress_is_in_order(status.version());
        Ok(Self { client, kv, prefix: prefix.to_owned(), ask_progress })
    }

    fn full(&self, key: &str) -> Vec<u8> {
        [self.prefix.as_bytes(), key.as_bytes()].concat()
    }

    /// A range as etcd says it: an end of one NUL is "no end".
    fn full_range(&self, range: &Range) -> (Vec<u8>, Vec<u8>) {
        let end = match &range.end {
            Some(end) => self.full(end),
            None => Range::prefix(&self.prefix).end.map_or_else(|| vec![0], String::into_bytes),
        };
        // An empty key means a NUL to etcd, the lowest there is.
        let start = self.full(&range.start);
        (if start.is_empty() { vec![0] } else { start }, end)
    }

    fn kv_of(&self, kv: &etcd_client::KeyValue) -> Result<KeyValue, Error> {
        kv_of(&self.prefix, kv)
    }

    fn compare(&self, condition: &Condition) -> Compare {
        let key = self.full(condition.key());
        match condition {
            Condition::Absent(_) => Compare::create_revision(key, CompareOp::Equal, 0),
            Condition::ModRevision(_, revision) => {
                Compare::mod_revision(key, CompareOp::Equal, to_etcd(*revision))
            }
        }
    }

    fn operation(&self, op: Op) -> TxnOp {
        let key = self.full(op.key());
        match op {
            Op::Put { value, .. } => TxnOp::put(key, value, None),
            Op::Delete { .. } => TxnOp::delete(key, None),
        }
    }

    /// Why etcd refused a read at `requested`: it is ahead, or it is compacted.
    async fn out_of_range(&self, requested: Revision) -> Error {
        let current = match self.current_revision().await {
            Ok(current) => current,
            Err(error) => return error,
        };
        if requested > current {
            return Error::Future { requested, current };
        }
        match watch::oldest_retained(&self.client).await {
            Ok(oldest) => Error::Compacted { requested, oldest },
            Err(error) => error,
        }
    }
}

#[async_trait::async_trait]
impl Store for EtcdStore {
    async fn txn(&self, conditions: Vec<Condition>, ops: Vec<Op>) -> Result<TxnOutcome, Error> {
        check_txn(&conditions, &ops)?;
        let compares: Vec<Compare> = conditions.iter().map(|condition| self.compare(condition)).collect();
        let states: Vec<TxnOp> =
            conditions.iter().map(|condition| TxnOp::get(self.full(condition.key()), None)).collect();
        let writes: Vec<TxnOp> = ops.into_iter().map(|op| self.operation(op)).collect();
        let txn = Txn::new().when(compares).and_then(writes).or_else(states);
        let response = bounded("writing to etcd", self.kv.clone().txn(txn)).await?;
        if response.succeeded() {
            return Ok(TxnOutcome::Committed(revision(response.header())?));
        }
        let states = response.op_responses().into_iter().map(|one| match one {
            TxnOpResponse::Get(get) => get.kvs().first().map(|kv| self.kv_of(kv)).transpose(),
            TxnOpResponse::Put(_) | TxnOpResponse::Delete(_) | TxnOpResponse::Txn(_) => {
                Err(Error::Damaged("etcd answered a read with something else".to_owned()))
            }
        });
        states.collect::<Result<_, _>>().map(TxnOutcome::Conflict)
    }

    async fn get(&self, key: &str) -> Result<Option<KeyValue>, Error> {
        check_key(key)?;
        let response = bounded("reading from etcd", self.kv.clone().get(self.full(key), None)).await?;
        response.kvs().first().map(|kv| self.kv_of(kv)).transpose()
    }

    async fn range(&self, range: Range, at: Revision, limit: usize) -> Result<Page, Error> {
        let (mut start, end) = self.full_range(&range);
        let wanted = if limit == 0 { usize::MAX } else { limit };
        let mut page = Page { revision: at, items: Vec::new(), more: false };
        if range.end.as_ref().is_some_and(|end| *end <= range.start) {
            // etcd takes some of these for other requests; only the revision is asked for.
            page.revision = if at.0 == 0 { self.current_revision().await? } else { at };
            return Ok(page);
        }
        loop {
            let left = i64::try_from(wanted - page.items.len()).unwrap_or(i64::MAX);
            let options = GetOptions::new()
                .with_range(end.clone())
                .with_limit(left.min(PAGE))
                .with_revision(to_etcd(page.revision));
            let read = bounded("reading from etcd", self.kv.clone().get(start.clone(), Some(options))).await;
            let response = match read {
                Err(Refused::Status { code: OUT_OF_RANGE, .. }) => {
                    return Err(self.out_of_range(page.revision).await);
                }
                other => other?,
            };
            if page.revision.0 == 0 {
                page.revision = revision(response.header())?;
            }
            for kv in response.kvs() {
                page.items.push(self.kv_of(kv)?);
            }
            page.more = response.more();
            match response.kvs().last() {
                Some(last) if page.more && page.items.len() < wanted => start = [last.key(), &[0]].concat(),
                _ => return Ok(page),
            }
        }
    }

    async fn watch(&self, range: Range, after: Revision) -> Result<Watch, Error> {
        watch::open(self, &range, after).await
    }

    async fn current_revision(&self) -> Result<Revision, Error> {
        // A linearizable read of nothing.
        let options = GetOptions::new().with_count_only();
        let nothing = [self.prefix.as_bytes(), &[0]].concat();
        let response = bounded("reading from etcd", self.kv.clone().get(nothing, Some(options))).await?;
        revision(response.header())
    }

    async fn compact(&self, at: Revision) -> Result<(), Error> {
        match bounded("compacting etcd", self.kv.clone().compact(to_etcd(at), None)).await {
            Ok(_) => Ok(()),
            Err(Refused::Status { code: OUT_OF_RANGE, .. }) => {
                let error = self.out_of_range(at).await;
                // If it is compacted, somebody has done it already.
                if matches!(error, Error::Compacted { .. }) { Ok(()) } else { Err(error) }
            }
            Err(other) => Err(other.into()),
        }
    }
}

fn client_tls(tls: TlsOptions) -> etcd_client::TlsOptions {
    let mut options =
        etcd_client::TlsOptions::new().ca_certificate(etcd_client::Certificate::from_pem(tls.ca));
    if let Some((certificate, key)) = tls.client {
        options = options.identity(etcd_client::Identity::from_pem(certificate, key));
    }
    if let Some(name) = tls.server_name {
        options = options.domain_name(name);
    }
    options
}

/// A call that failed, with the status code if the server answered at all.
#[derive(Debug)]
enum Refused {
    Status { code: i32, error: Error },
    Other(Error),
}

impl From<Refused> for Error {
    fn from(refused: Refused) -> Self {
        match refused {
            Refused::Status { code: INVALID_ARGUMENT, .. } => Error::Invalid("etcd doesn't take it"),
            Refused::Status { error, .. } | Refused::Other(error) => error,
        }
    }
}

/// A call, given up after [`CALL_TIMEOUT`].
async fn bounded<T>(
    during: &'static str,
    call: impl Future<Output = Result<T, etcd_client::Error>>,
) -> Result<T, Refused> {
    match tokio::time::timeout(CALL_TIMEOUT, call).await {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(etcd_client::Error::GRpcStatus(status))) => {
            let code = i32::from(status.code());
            Err(Refused::Status { code, error: failed(during, etcd_client::Error::GRpcStatus(status)) })
        }
        Ok(Err(error)) => Err(Refused::Other(failed(during, error))),
        Err(elapsed) => Err(Refused::Other(Error::Unavailable { during, source: Some(Box::new(elapsed)) })),
    }
}

fn failed(during: &'static str, error: etcd_client::Error) -> Error {
    Error::Unavailable { during, source: Some(Box::new(error)) }
}

/// Revisions of etcd are signed; ours never reach the sign.
fn to_etcd(revision: Revision) -> i64 {
    i64::try_from(revision.0).unwrap_or(i64::MAX)
}

fn from_etcd(revision: i64) -> Revision {
    Revision(u64::try_from(revision).unwrap_or(0))
}

fn revision(header: Option<&etcd_client::ResponseHeader>) -> Result<Revision, Error> {
    let header = header.ok_or_else(|| Error::Damaged("etcd answered without a header".to_owned()))?;
    Ok(from_etcd(header.revision()))
}

fn kv_of(prefix: &str, kv: &etcd_client::KeyValue) -> Result<KeyValue, Error> {
    let key = std::str::from_utf8(kv.key()).ok().and_then(|key| key.strip_prefix(prefix));
    let key = key.ok_or_else(|| Error::Damaged("etcd answered with a key that isn't ours".to_owned()))?;
    Ok(KeyValue {
        key: key.to_owned(),
        value: Bytes::copy_from_slice(kv.value()),
        create_revision: from_etcd(kv.create_revision()),
        mod_revision: from_etcd(kv.mod_revision()),
    })
}
