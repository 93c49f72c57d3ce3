//! Container logs in CRI's format: lines `<time> <stream> <P|F> <text>`, read from files and followed by inotify.

use std::ffi::OsString;
use std::io;
use std::mem::MaybeUninit;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use jiff::Timestamp;
use rustix::fs::inotify;
use tokio::fs::File;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncSeekExt};
use tokio::sync::mpsc;

/// So much is read at once, and at the most held for one line.
const CHUNK: usize = 64 * 1024;
const MAX_LINE: usize = 1024 * 1024;

/// One line of a log file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Line<'a> {
    pub(crate) time: Timestamp,
    /// The time as written.
    pub(crate) stamp: &'a str,
    /// The rest belongs to the same line of the container.
    pub(crate) partial: bool,
    pub(crate) text: &'a [u8],
}

/// Reads a line without its newline; `None` if it is not in CRI's format.
pub(crate) fn parse(line: &[u8]) -> Option<Line<'_>> {
    let mut fields = line.splitn(4, |b| *b == b' ');
    let stamp = std::str::from_utf8(fields.next()?).ok()?;
    let time = stamp.parse().ok()?;
    let stream = fields.next()?;
    if stream != b"stdout" && stream != b"stderr" {
        return None;
    }
    let partial = match fields.next()?.split(|b| *b == b':').next()? {
        b"P" => true,
        b"F" => false,
        _ => return None,
    };
    Some(Line { time, stamp, partial, text: fields.next().unwrap_or_default() })
}

/// Which lines are wanted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Options {
    pub(crate) follow: bool,
    pub(crate) timestamps: bool,
    pub(crate) since: Option<Timestamp>,
    pub(crate) tail: Option<u64>,
    pub(crate) limit_bytes: Option<u64>,
}

/// Where the lines go; an error means that nobody listens any more.
pub(crate) type Sink = mpsc::Sender<Result<Bytes, io::Error>>;

/// The files of a log, oldest first: the rotated ones (`0.log.<time>`), then the present one.
async fn files(log: &Path) -> Vec<PathBuf> {
    let mut rotated = Vec::new();
    if let (Some(dir), Some(name)) = (log.parent(), log.file_name().and_then(|n| n.to_str()))
        && let Ok(mut entries) = tokio::fs::read_dir(dir).await
    {
        while let Ok(Some(entry)) = entries.next_entry().await {
            let other = entry.file_name().into_string().unwrap_or_default();
            // Compressed ones are past reading here, as in upstream.
            if other.strip_prefix(name).is_some_and(|rest| rest.starts_with('.')) && !other.ends_with(".gz") {
                rotated.push(entry.path());
            }
        }
    }
    rotated.sort();
    rotated.push(log.to_owned());
    rotated
}

/// Copies lines to the sink.
struct Copier<'a> {
    options: &'a Options,
    sink: &'a Sink,
    left: Option<u64>,
    rest: Vec<u8>,
    /// The last line written was not whole: no new stamp within it.
    within: bool,
}

/// The sink is closed or has all it wanted.
struct Enough;

impl Copier<'_> {
    async fn take(&mut self, bytes: &[u8]) -> Result<(), Enough> {
        self.rest.extend_from_slice(bytes);
        let mut out = Vec::new();
        let mut begin = 0;
        while let Some(length) = self.rest[begin..].iter().position(|b| *b == b'\n') {
            let end = begin + length;
            render(&self.rest[begin..end], self.options, &mut self.within, &mut out);
            begin = end + 1;
        }
        self.rest.drain(..begin);
        if self.rest.len() > MAX_LINE {
            self.rest.clear();
        }
        self.emit(out).await
    }

    async fn emit(&mut self, mut out: Vec<u8>) -> Result<(), Enough> {
        if let Some(left) = &mut self.left {
            out.truncate(usize::try_from(*left).unwrap_or(usize::MAX));
            *left -= out.len() as u64;
        }
        if !out.is_empty() {
            self.sink.send(Ok(Bytes::from(out))).await.map_err(|_closed| Enough)?;
        }
        if self.left == Some(0) { Err(Enough) } else { Ok(()) }
    }
}

fn render(raw: &[u8], options: &Options, within: &mut bool, out: &mut Vec<u8>) {
    let Some(line) = parse(raw) else { return };
    if options.since.is_some_and(|since| line.time < since) {
        return;
    }
    if options.timestamps && !*within {
        out.extend_from_slice(line.stamp.as_bytes());
        out.push(b' ');
    }
    out.extend_from_slice(line.text);
    if !line.partial {
        out.push(b'\n');
    }
    *within = line.partial;
}

/// The last lines of a file.
struct Tail {
    /// Where they begin, or how many lines the file lacks.
    begin: Result<u64, u64>,
    /// Where the last line that is whole ends; one that is being written may follow.
    end: u64,
}

/// Finds the last `lines` lines of the file's first `size` bytes.
async fn tail(file: &mut File, size: u64, lines: u64) -> io::Result<Tail> {
    let mut last_end = None;
    let mut before = size;
    let mut found = 0;
    let mut buffer = vec![0; CHUNK];
    while before > 0 {
        let begin = before.saturating_sub(CHUNK as u64);
        let length = usize::try_from(before - begin).unwrap_or(CHUNK);
        file.seek(io::SeekFrom::Start(begin)).await?;
        file.read_exact(&mut buffer[..length]).await?;
        for (index, _) in buffer[..length].iter().enumerate().rev().filter(|(_, b)| **b == b'\n') {
            let next_begins = begin + index as u64 + 1;
            let end = *last_end.get_or_insert(next_begins);
            if found == lines {
                return Ok(Tail { begin: Ok(next_begins), end });
            }
            found += 1;
        }
        before = begin;
    }
    let begin = if found >= lines { Ok(0) } else { Err(lines - found) };
    Ok(Tail { begin, end: last_end.unwrap_or(0) })
}

/// Sends the log to the sink; with `follow` until `ended` resolves (the container ended) or the reader leaves.
pub(crate) async fn copy(
    log: &Path,
    options: &Options,
    sink: &Sink,
    ended: impl Future<Output = ()>,
) -> io::Result<()> {
    let mut copier = Copier { options, sink, left: options.limit_bytes, rest: Vec::new(), within: false };
    let mut files = files(log).await;
    let (mut from, mut to) = (0, u64::MAX);
    if let Some(mut lines) = options.tail {
        for (index, path) in files.iter().enumerate().rev() {
            let Some(mut file) = open(path).await? else { continue };
            let size = file.metadata().await?.len();
            let tail = tail(&mut file, size, lines).await?;
            // What is written from here on are further lines.
            if index + 1 == files.len() {
                to = tail.end;
            }
            match tail.begin {
                Ok(offset) => {
                    files.drain(..index);
                    from = offset;
                    break;
                }
                Err(lacking) => lines = lacking,
            }
        }
    }
    let Some((present, rotated)) = files.split_last() else { return Ok(()) };
    for path in rotated {
        if let Some(mut file) = open(path).await? {
            file.seek(io::SeekFrom::Start(std::mem::take(&mut from))).await?;
            if drain(&mut file, &mut copier).await?.is_err() {
                return Ok(());
            }
        }
    }
    if options.follow {
        return follow(present, from, &mut copier, ended).await;
    }
    if let Some(mut file) = open(present).await? {
        file.seek(io::SeekFrom::Start(from)).await?;
        // Whether the reader had enough makes no difference at the end.
        let (Ok(()) | Err(Enough)) = drain(&mut file.take(to.saturating_sub(from)), &mut copier).await?;
    }
    Ok(())
}

async fn open(path: &Path) -> io::Result<Option<File>> {
    match File::open(path).await {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

async fn drain(
    file: &mut (impl AsyncRead + Unpin),
    copier: &mut Copier<'_>,
) -> io::Result<Result<(), Enough>> {
    let mut buffer = vec![0; CHUNK];
    loop {
        let length = file.read(&mut buffer).await?;
        if length == 0 {
            return Ok(Ok(()));
        }
        if copier.take(&buffer[..length]).await.is_err() {
            return Ok(Err(Enough));
        }
    }
}

async fn follow(
    path: &Path,
    from: u64,
    copier: &mut Copier<'_>,
    ended: impl Future<Output = ()>,
) -> io::Result<()> {
    // Watched before it is read: what is written in between wakes.
    let watch = Watch::new(path)?;
    let mut file = match open(path).await? {
        Some(mut file) => {
            file.seek(io::SeekFrom::Start(from)).await?;
            Some(file)
        }
        None => None,
    };
    let mut ended = std::pin::pin!(ended);
    let mut last_round = false;
    loop {
        if let Some(open) = &mut file
            && drain(open, copier).await?.is_err()
        {
            return Ok(());
        }
        if last_round {
            return Ok(());
        }
        tokio::select! {
            () = &mut ended => last_round = true,
            () = copier.sink.closed() => return Ok(()),
            replaced = watch.changed() => {
                if replaced? || file.is_none() {
                    // Rotated: the rest of the old file first, then the new one from its beginning.
                    if let Some(old) = &mut file && drain(old, copier).await?.is_err() {
                        return Ok(());
                    }
                    file = open(path).await?;
                }
            }
        }
    }
}

/// Watches a file's folder: writes to the file, and another file taking its place.
struct Watch {
    fd: AsyncFd<std::os::fd::OwnedFd>,
    name: OsString,
}

impl Watch {
    fn new(path: &Path) -> io::Result<Self> {
        let fd = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)?;
        let dir = path.parent().unwrap_or(Path::new("/"));
        let flags = inotify::WatchFlags::MODIFY | inotify::WatchFlags::CREATE | inotify::WatchFlags::MOVED_TO;
        inotify::add_watch(&fd, dir, flags)?;
        Ok(Self { fd: crate::pollable::register(fd)?, name: path.file_name().unwrap_or_default().to_owned() })
    }

    /// Waits for a change of the file; whether another one took its place.
    async fn changed(&self) -> io::Result<bool> {
        use std::os::unix::ffi::OsStrExt;
        loop {
            let mut guard = self.fd.readable().await?;
            let mut space = [MaybeUninit::uninit(); 4096];
            let mut reader = inotify::Reader::new(self.fd.get_ref(), &mut space);
            let (mut ours, mut replaced) = (false, false);
            loop {
                match reader.next() {
                    Ok(event) => {
                        let lost = event.events().contains(inotify::ReadFlags::QUEUE_OVERFLOW);
                        let named = event.file_name().is_some_and(|n| n.to_bytes() == self.name.as_bytes());
                        ours |= named || lost;
                        let new = inotify::ReadFlags::CREATE | inotify::ReadFlags::MOVED_TO;
                        replaced |= (named && event.events().intersects(new)) || lost;
                        if reader.is_buffer_empty() {
                            break;
                        }
                    }
                    Err(rustix::io::Errno::AGAIN) => {
                        guard.clear_ready();
                        break;
                    }
                    Err(error) => return Err(error.into()),
                }
            }
            if ours {
                return Ok(replaced);
            }
        }
    }
}

/// The end of a log as plain text: at most so many lines and bytes. Empty if it can't be read.
pub(crate) async fn tail_text(log: &Path, lines: usize, bytes: usize) -> String {
    let options = Options { tail: Some(lines as u64), ..Options::default() };
    let (sink, mut receiver) = mpsc::channel(4);
    let read = async move {
        // An unreadable log only costs the text of a message.
        let _ = copy(log, &options, &sink, std::future::ready(())).await;
        drop(sink);
    };
    let collect = async {
        let mut text = Vec::new();
        while let Some(Ok(chunk)) = receiver.recv().await {
            text.extend_from_slice(&chunk);
            let over = text.len().saturating_sub(bytes);
            text.drain(..over);
        }
        text
    };
    let ((), text) = tokio::join!(read, collect);
    String::from_utf8_lossy(&text).into_owned()
}

#[cfg(test)]
mod tests;
