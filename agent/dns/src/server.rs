//! Takes queries over UDP and TCP and sends what `answer` decides.

pub mod fuzz;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use hickory_proto::op::{Edns, Message, MessageType, OpCode, ResponseCode};
use hickory_proto::rr::{Name, RecordType};
use parking_lot::RwLock;
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::Semaphore;
use tokio::time::timeout;

use crate::Error;
use crate::answer::{Answer, Zone};
use crate::forward::{Forwarder, read_message, write_message};
use crate::index::Index;

/// Forwarded queries and TCP connections in flight; more wait in the socket's own queue or are refused.
const IN_FLIGHT: usize = 512;
/// An idle TCP connection is closed after this (RFC 7766 §6.2.3 asks for seconds).
const TCP_IDLE: Duration = Duration::from_secs(10);
/// A UDP reply without EDNS is no longer than this (RFC 1035 §4.2.1).
const PLAIN_UDP_BYTES: u16 = 512;
/// What we announce and send over UDP at the most; larger replies would be fragmented on the overlay.
const EDNS_UDP_BYTES: u16 = 1232;
/// Aliases followed within the cluster or through the resolvers.
const MAX_ALIASES: u8 = 8;

/// Bound sockets and what it takes to answer.
pub(crate) struct Server {
    udp: UdpSocket,
    tcp: TcpListener,
    shared: Arc<Shared>,
}

struct Shared {
    zone: Zone,
    index: Arc<RwLock<Index>>,
    forwarder: Forwarder,
    in_flight: Arc<Semaphore>,
}

/// What the tables alone say about a query.
enum Decision {
    Reply(Box<Message>),
    /// The resolvers must be asked as the query came.
    Forward,
    /// The name is an alias of one elsewhere; the reply so far, and what to ask for.
    Follow(Box<Message>, Name, RecordType),
    /// No reply at all: not a query.
    Ignore,
}

impl Server {
    pub(crate) async fn bind(
        address: SocketAddr,
        zone: Zone,
        index: Arc<RwLock<Index>>,
        forwarder: Forwarder,
    ) -> Result<Self, Error> {
        let failed = |source| Error::Listen { address, source };
        let udp = UdpSocket::bind(address).await.map_err(failed)?;
        let tcp = TcpListener::bind(address).await.map_err(failed)?;
        let in_flight = Arc::new(Semaphore::new(IN_FLIGHT));
        Ok(Self { udp, tcp, shared: Arc::new(Shared { zone, index, forwarder, in_flight }) })
    }

    /// Serves until it is dropped.
    pub(crate) async fn serve(self) {
        let Self { udp, tcp, shared } = self;
        let udp = Arc::new(udp);
        let mut tasks = tokio::task::JoinSet::new();
        let mut datagram = vec![0; 4096];
        loop {
            tokio::select! {
                received = udp.recv_from(&mut datagram) => match received {
                    Ok((length, client)) => serve_datagram(&shared, &udp, &datagram[..length], client, &mut tasks),
                    // An ICMP error of an earlier reply; the socket itself is sound.
                    Err(error) => tracing::debug!(%error, "receive a DNS query"),
                },
                accepted = tcp.accept() => match accepted {
                    Ok((stream, _)) => if let Ok(permit) = shared.in_flight.clone().try_acquire_owned() {
                        let shared = shared.clone();
                        tasks.spawn(async move {
                            if let Err(error) = shared.connection(stream).await {
                                tracing::debug!(%error, "a DNS connection broke");
                            }
                            drop(permit);
                        });
                    },
                    Err(error) => tracing::warn!(%error, "accept a DNS connection"),
                },
                Some(_) = tasks.join_next() => {}
            }
        }
    }
}

/// Names of the cluster are answered in place; only what must be forwarded gets a task.
fn serve_datagram(
    shared: &Arc<Shared>,
    socket: &Arc<UdpSocket>,
    query: &[u8],
    client: SocketAddr,
    tasks: &mut tokio::task::JoinSet<()>,
) {
    let Ok(message) = Message::from_vec(query) else { return };
    match shared.decide(&message) {
        Decision::Ignore => {}
        Decision::Reply(reply) => {
            if let Some(bytes) = encode(&message, &reply, true) {
                // A full send buffer drops the reply, as the network would; the client asks again.
                let _ = socket.try_send_to(&bytes, client);
            }
        }
        decision @ (Decision::Forward | Decision::Follow(..)) => {
            let Ok(permit) = shared.in_flight.clone().try_acquire_owned() else { return };
            let (shared, socket, query) = (shared.clone(), socket.clone(), query.to_vec());
            tasks.spawn(async move {
                if let Some(bytes) = shared.finish(&message, decision, &query, false).await {
                    let _ = socket.send_to(&bytes, client).await;
                }
                drop(permit);
            });
        }
    }
}

impl Shared {
    async fn connection(&self, mut stream: TcpStream) -> std::io::Result<()> {
        while let Ok(message) = timeout(TCP_IDLE, read_message(&mut stream)).await {
            let Some(query) = message? else { break };
            let Ok(message) = Message::from_vec(&query) else { break };
            let decision = self.decide(&message);
            if let Some(reply) = self.finish(&message, decision, &query, true).await {
                write_message(&mut stream, &reply).await?;
            }
        }
        Ok(())
    }

    fn decide(&self, query: &Message) -> Decision {
        if query.metadata.message_type != MessageType::Query {
            return Decision::Ignore;
        }
        let mut reply = reply_to(query);
        let [question] = query.queries.as_slice() else {
            reply.metadata.response_code = ResponseCode::FormErr;
            return Decision::Reply(Box::new(reply));
        };
        if query.metadata.op_code != OpCode::Query {
            reply.metadata.response_code = ResponseCode::NotImp;
            return Decision::Reply(Box::new(reply));
        }
        let kind = question.query_type();
        let mut name = question.name().clone();
        let index = self.index.read();
        for _ in 0..MAX_ALIASES {
            match self.zone.answer(&index, &name, kind) {
                Answer::Elsewhere if reply.answers.is_empty() => return Decision::Forward,
                Answer::Elsewhere => return Decision::Follow(Box::new(reply), name, kind),
                Answer::Records(records) => {
                    reply.metadata.authoritative = true;
                    if records.is_empty() {
                        reply.add_authorities(self.zone.start_of_authority());
                    }
                    reply.add_answers(records);
                    return Decision::Reply(Box::new(reply));
                }
                Answer::Alias(record, target) => {
                    reply.metadata.authoritative = true;
                    reply.add_answer(*record);
                    if kind == RecordType::CNAME {
                        return Decision::Reply(Box::new(reply));
                    }
                    name = target;
                }
                Answer::NoSuchName => {
                    reply.metadata.authoritative = true;
                    reply.metadata.response_code = ResponseCode::NXDomain;
                    reply.add_authorities(self.zone.start_of_authority());
                    return Decision::Reply(Box::new(reply));
                }
                Answer::NotReady => break,
            }
        }
        reply.metadata.response_code = ResponseCode::ServFail;
        Decision::Reply(Box::new(reply))
    }

    /// Carries out what remains of a decision; answers the bytes to send.
    async fn finish(
        &self,
        query: &Message,
        decision: Decision,
        raw: &[u8],
        over_tcp: bool,
    ) -> Option<Vec<u8>> {
        match decision {
            Decision::Ignore => None,
            Decision::Reply(reply) => encode(query, &reply, !over_tcp),
            Decision::Forward => match self.forwarder.ask(raw, over_tcp).await {
                Some(reply) => Some(reply),
                None => {
                    let mut reply = reply_to(query);
                    reply.metadata.response_code = ResponseCode::ServFail;
                    encode(query, &reply, !over_tcp)
                }
            },
            Decision::Follow(mut reply, name, kind) => {
                self.follow(&mut reply, name, kind).await;
                encode(query, &reply, !over_tcp)
            }
        }
    }

    /// Adds what the resolvers say of an alias' target; the alias alone is an answer too.
    async fn follow(&self, reply: &mut Message, name: Name, kind: RecordType) {
        let mut query = Message::query();
        query.metadata.id = rand::random();
        query.metadata.recursion_desired = true;
        query.add_query(hickory_proto::op::Query::query(name, kind));
        let Ok(raw) = query.to_vec() else { return };
        let Some(bytes) = self.forwarder.ask(&raw, false).await else { return };
        if let Ok(found) = Message::from_vec(&bytes) {
            reply.add_answers(found.answers);
        }
    }
}

fn reply_to(query: &Message) -> Message {
    let mut reply = Message::response(query.metadata.id, query.metadata.op_code);
    reply.metadata.recursion_desired = query.metadata.recursion_desired;
    reply.metadata.recursion_available = true;
    reply.add_queries(query.queries.iter().cloned());
    if query.edns.is_some() {
        let mut edns = Edns::new();
        edns.set_max_payload(EDNS_UDP_BYTES);
        reply.set_edns(edns);
    }
    reply
}

/// The reply's bytes; over UDP one that is too long is sent empty and marked truncated, so that the client asks over TCP.
fn encode(query: &Message, reply: &Message, over_udp: bool) -> Option<Vec<u8>> {
    let bytes = reply.to_vec().ok()?;
    let announced = query.edns.as_ref().map_or(PLAIN_UDP_BYTES, Edns::max_payload);
    let limit = announced.clamp(PLAIN_UDP_BYTES, EDNS_UDP_BYTES);
    if over_udp && bytes.len() > usize::from(limit) { reply.truncate().to_vec().ok() } else { Some(bytes) }
}

#[cfg(test)]
mod tests;
