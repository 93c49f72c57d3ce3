//! `/exec/{namespace}/{pod}/{container}`: a command over a WebSocket, `v5.channel.k8s.io` or `v4.channel.k8s.io`.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::WebSocketUpgrade;
use axum::extract::ws::{CloseFrame, Message, WebSocket, close_code};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures::{SinkExt, StreamExt};
use http::StatusCode;
use serde_json::json;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::pipe;
use tokio::sync::mpsc;
use weft_agent_runtime::Stdio;

use super::Query;
use crate::shared::Shared;
use weft_agent_runtime::chain;

const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
const ERROR: u8 = 3;
const RESIZE: u8 = 4;
const CLOSE: u8 = 255;
const V5: &str = "v5.channel.k8s.io";
const V4: &str = "v4.channel.k8s.io";
/// Frames on their way to the client.
const QUEUE: usize = 16;
const CHUNK: usize = 32 * 1024;
/// Nothing is sent before this: client-go up to 1.32 begins to read before it has made its streams, and throws away
/// what comes for those. The command runs meanwhile.
const HEAD_START: Duration = Duration::from_millis(50);

/// Output may come so long after the command has ended.
const OUTPUT_LINGER: Duration = Duration::from_millis(200);

/// What is to be run, and with which streams.
#[derive(Clone, Debug)]
struct Request {
    command: Vec<String>,
    stdin: bool,
    stdout: bool,
    stderr: bool,
    tty: bool,
}

/// Upgrades and runs.
pub(super) fn serve(
    shared: Arc<Shared>,
    container_id: String,
    upgrade: WebSocketUpgrade,
    query: &Query,
) -> Response {
    let request = Request {
        command: query.all("command"),
        stdin: query.flag(&["input", "stdin"]),
        stdout: query.flag(&["output", "stdout"]),
        stderr: query.flag(&["error", "stderr"]),
        tty: query.flag(&["tty"]),
    };
    if request.command.is_empty() {
        return (StatusCode::BAD_REQUEST, "you must specify at least one command for exec").into_response();
    }
    if !(request.stdin || request.stdout || request.stderr) {
        return (StatusCode::BAD_REQUEST, "you must specify at least 1 of stdin, stdout, stderr")
            .into_response();
    }
    let upgrade = upgrade.protocols([V5, V4]);
    if upgrade.selected_protocol().is_none() {
        return (StatusCode::FORBIDDEN, format!("none of the protocols is known: {V5}, {V4}"))
            .into_response();
    }
    upgrade.on_upgrade(move |socket| session(shared, container_id, request, socket))
}

fn frame(channel: u8, data: &[u8]) -> Message {
    let mut bytes = Vec::with_capacity(data.len() + 1);
    bytes.push(channel);
    bytes.extend_from_slice(data);
    Message::Binary(Bytes::from(bytes))
}

/// The end of a session as the error channel tells it: a metav1.Status.
fn status(result: &Result<i32, String>) -> Vec<u8> {
    let status = match result {
        Ok(0) => json!({"metadata": {}, "status": "Success"}),
        Ok(code) => json!({"metadata": {}, "status": "Failure", "reason": "NonZeroExitCode",
            "message": format!("command terminated with non-zero exit code: exit status {code}"),
            "details": {"causes": [{"reason": "ExitCode", "message": code.to_string()}]}}),
        Err(message) => json!({"metadata": {}, "status": "Failure", "reason": "InternalError",
            "message": message, "code": 500}),
    };
    status.to_string().into_bytes()
}

/// Our ends of the streams.
enum Streams {
    Pipes { stdin: Option<pipe::Sender>, stdout: Option<pipe::Receiver>, stderr: Option<pipe::Receiver> },
    Terminal(Arc<AsyncFd<OwnedFd>>),
}

fn open(request: &Request) -> io::Result<(Stdio, Streams)> {
    if request.tty {
        let pty = nix::pty::openpty(None, None)?;
        for fd in [&pty.master, &pty.slave] {
            rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::CLOEXEC)?;
        }
        rustix::io::ioctl_fionbio(&pty.master, true)?;
        let master = Arc::new(crate::pollable::register(pty.master)?);
        return Ok((Stdio { tty: Some(pty.slave), ..Stdio::default() }, Streams::Terminal(master)));
    }
    let mut stdio = Stdio::default();
    let mut stdin = None;
    if request.stdin {
        let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
        rustix::io::ioctl_fionbio(&write, true)?;
        stdin = Some(pipe::Sender::from_owned_fd(write)?);
        stdio.stdin = Some(read);
    }
    let output = |wanted: bool| -> io::Result<(Option<pipe::Receiver>, Option<OwnedFd>)> {
        if !wanted {
            return Ok((None, None));
        }
        crate::hooks::output_pipe().map(|(receiver, fd)| (Some(receiver), Some(fd)))
    };
    let (stdout, fd) = output(request.stdout)?;
    stdio.stdout = fd;
    let (stderr, fd) = output(request.stderr)?;
    stdio.stderr = fd;
    Ok((stdio, Streams::Pipes { stdin, stdout, stderr }))
}

async fn session(shared: Arc<Shared>, container_id: String, request: Request, socket: WebSocket) {
    let (mut writer, mut reader) = socket.split();
    let (frames, mut queue) = mpsc::channel::<Message>(QUEUE);
    let earliest = tokio::time::Instant::now() + HEAD_START;
    let (stdio, streams) = match open(&request) {
        Ok(opened) => opened,
        Err(error) => {
            let _ = writer.send(frame(ERROR, &status(&Err(error.to_string())))).await;
            return;
        }
    };
    let run = async {
        let exec = shared.runtime.exec(&container_id, request.command.clone(), stdio);
        match streams {
            Streams::Pipes { stdin, stdout, stderr } => {
                let output =
                    async { tokio::join!(copy(stdout, STDOUT, &frames), copy(stderr, STDERR, &frames)) };
                let input = pipe_input(&mut reader, stdin);
                with_output(exec, output, input).await
            }
            Streams::Terminal(master) => {
                let output = read_terminal(&master, &frames);
                let input = terminal_input(&mut reader, &master);
                with_output(exec, output, input).await
            }
        }
    };
    let send = async {
        tokio::time::sleep_until(earliest).await;
        while let Some(message) = queue.recv().await {
            if writer.send(message).await.is_err() {
                return;
            }
        }
    };
    let result = {
        let mut run = std::pin::pin!(run);
        let mut send = std::pin::pin!(send);
        tokio::select! {
            result = &mut run => result,
            // The client is gone.
            () = &mut send => None,
        }
    };
    tokio::time::sleep_until(earliest).await;
    // What was still queued goes out before the verdict.
    queue.close();
    while let Some(message) = queue.recv().await {
        if writer.send(message).await.is_err() {
            return;
        }
    }
    if let Some(result) = result {
        let _ = writer.send(frame(ERROR, &status(&result))).await;
    }
    // Clients take any other end than a normal one for a failure, whatever the error channel said.
    let normal = CloseFrame { code: close_code::NORMAL, reason: "".into() };
    let _ = writer.send(Message::Close(Some(normal))).await;
}

/// Waits for the command and then for its output; `None` if the client left before.
async fn with_output<T>(
    exec: impl Future<Output = Result<i32, weft_agent_runtime::Error>>,
    output: impl Future<Output = T>,
    input: impl Future<Output = ()>,
) -> Option<Result<i32, String>> {
    let work = async {
        let mut exec = std::pin::pin!(exec);
        let mut output = std::pin::pin!(output);
        let (result, done) = tokio::select! {
            result = &mut exec => (result, false),
            _ = &mut output => (exec.await, true),
        };
        if !done {
            // A child left behind may hold the streams open: its output is not waited for.
            let _ = tokio::time::timeout(OUTPUT_LINGER, output).await;
        }
        result.map_err(|error| chain(&error))
    };
    tokio::select! {
        result = work => Some(result),
        () = input => None,
    }
}

async fn copy(stream: Option<pipe::Receiver>, channel: u8, frames: &mpsc::Sender<Message>) {
    let Some(mut stream) = stream else { return };
    let mut buffer = vec![0; CHUNK];
    loop {
        match stream.read(&mut buffer).await {
            Ok(0) | Err(_) => return,
            Ok(length) => {
                if frames.send(frame(channel, &buffer[..length])).await.is_err() {
                    return;
                }
            }
        }
    }
}

async fn read_terminal(master: &AsyncFd<OwnedFd>, frames: &mpsc::Sender<Message>) {
    let mut buffer = vec![0; CHUNK];
    loop {
        let Ok(mut guard) = master.readable().await else { return };
        match guard.try_io(|fd| Ok(rustix::io::read(fd.get_ref(), &mut buffer)?)) {
            // EIO: nobody has the other end any more.
            Ok(Ok(0) | Err(_)) => return,
            Ok(Ok(length)) => {
                if frames.send(frame(STDOUT, &buffer[..length])).await.is_err() {
                    return;
                }
            }
            Err(_would_block) => {}
        }
    }
}

async fn write_terminal(master: &AsyncFd<OwnedFd>, mut data: &[u8]) -> io::Result<()> {
    while !data.is_empty() {
        let mut guard = master.writable().await?;
        match guard.try_io(|fd| Ok(rustix::io::write(fd.get_ref(), data)?)) {
            Ok(written) => data = &data[written?..],
            Err(_would_block) => {}
        }
    }
    Ok(())
}

/// What a frame of the client means.
#[derive(Debug, PartialEq, Eq)]
enum Input<'a> {
    Data(&'a [u8]),
    Resize(u16, u16),
    CloseStdin,
    Nothing,
}

fn understand(bytes: &[u8]) -> Input<'_> {
    match bytes.split_first() {
        Some((&STDIN, data)) => Input::Data(data),
        Some((&RESIZE, data)) => {
            let size: serde_json::Value = serde_json::from_slice(data).unwrap_or_default();
            let side = |name: &str| size[name].as_u64().and_then(|n| u16::try_from(n).ok());
            match (side("Width").or_else(|| side("width")), side("Height").or_else(|| side("height"))) {
                (Some(width), Some(height)) => Input::Resize(width, height),
                _ => Input::Nothing,
            }
        }
        Some((&CLOSE, [STDIN])) => Input::CloseStdin,
        _ => Input::Nothing,
    }
}

type Reader = futures::stream::SplitStream<WebSocket>;

/// The next data of the client; `None` when it has left.
async fn next(reader: &mut Reader) -> Option<Bytes> {
    loop {
        match reader.next().await? {
            Ok(Message::Binary(bytes)) => return Some(bytes),
            Ok(Message::Text(text)) => return Some(Bytes::copy_from_slice(text.as_bytes())),
            Ok(Message::Ping(_) | Message::Pong(_)) => {}
            Ok(Message::Close(_)) | Err(_) => return None,
        }
    }
}

async fn pipe_input(reader: &mut Reader, mut stdin: Option<pipe::Sender>) {
    while let Some(bytes) = next(reader).await {
        match understand(&bytes) {
            Input::Data(data) => {
                if let Some(pipe) = &mut stdin
                    && pipe.write_all(data).await.is_err()
                {
                    // The command reads no more; what it still says is wanted.
                    stdin = None;
                }
            }
            Input::CloseStdin => stdin = None,
            Input::Resize(..) | Input::Nothing => {}
        }
    }
}

async fn terminal_input(reader: &mut Reader, master: &AsyncFd<OwnedFd>) {
    while let Some(bytes) = next(reader).await {
        match understand(&bytes) {
            Input::Data(data) => {
                if write_terminal(master, data).await.is_err() {
                    std::future::pending::<()>().await;
                }
            }
            Input::Resize(width, height) => {
                let size =
                    rustix::termios::Winsize { ws_row: height, ws_col: width, ws_xpixel: 0, ws_ypixel: 0 };
                // A terminal that is gone has no size.
                let _ = rustix::termios::tcsetwinsize(master.get_ref(), size);
            }
            // End of file of a terminal is a character.
            Input::CloseStdin => drop(write_terminal(master, &[4]).await),
            Input::Nothing => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_understood() {
        assert_eq!(understand(b"\0hi"), Input::Data(b"hi"));
        assert_eq!(understand(b"\x04{\"Width\":80,\"Height\":24}"), Input::Resize(80, 24));
        assert_eq!(understand(b"\x04junk"), Input::Nothing);
        assert_eq!(understand(&[255, 0]), Input::CloseStdin);
        assert_eq!(understand(b""), Input::Nothing);
    }

    #[test]
    fn the_verdict_carries_the_exit_code() {
        let value: serde_json::Value = serde_json::from_slice(&status(&Ok(3))).unwrap();
        assert_eq!(value["reason"], "NonZeroExitCode");
        assert_eq!(value["details"]["causes"][0]["message"], "3");
        let value: serde_json::Value = serde_json::from_slice(&status(&Ok(0))).unwrap();
        assert_eq!(value["status"], "Success");
    }
}
