//! The yardstick of HTTP: a server that only answers, with one thread per core, as a gateway has.

use std::convert::Infallible;
use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::num::NonZero;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::header::CONTENT_TYPE;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use tokio::sync::mpsc;

/// The answer to everything: that of a gateway to an increment.
const BODY: &[u8] = br#"{"namespace":"bench","key":"k123456","applied":1}"#;

/// Starts the server on a free port of 127.0.0.1, in threads that run until the process ends.
/// Returns its address.
pub fn start() -> io::Result<SocketAddr> {
    let listener = TcpListener::bind((std::net::Ipv4Addr::LOCALHOST, 0))?;
    let address = listener.local_addr()?;
    let cores = std::thread::available_parallelism().map_or(1, NonZero::get);
    let workers = (0..cores).map(start_worker).collect::<io::Result<Vec<_>>>()?;
    std::thread::Builder::new().name("accept".to_owned()).spawn(move || {
        let next = AtomicUsize::new(0);
        for stream in listener.incoming().flatten() {
            let worker = next.fetch_add(1, Ordering::Relaxed) % workers.len();
            // A worker ends only with the process.
            let _ = workers[worker].send(stream);
        }
    })?;
    Ok(address)
}

fn start_worker(number: usize) -> io::Result<mpsc::UnboundedSender<TcpStream>> {
    let (send, mut streams) = mpsc::unbounded_channel::<TcpStream>();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    std::thread::Builder::new().name(format!("worker-{number}")).spawn(move || {
        runtime.block_on(async {
            while let Some(stream) = streams.recv().await {
                tokio::spawn(serve(stream));
            }
        });
    })?;
    Ok(send)
}

async fn serve(stream: TcpStream) {
    let ready = stream.set_nonblocking(true).and_then(|()| stream.set_nodelay(true));
    let Ok(stream) = ready.and_then(|()| tokio::net::TcpStream::from_std(stream)) else { return };
    // A connection ends with an error when its client goes away.
    let _ = http1::Builder::new().serve_connection(TokioIo::new(stream), service_fn(answer)).await;
}

async fn answer(request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Infallible> {
    // The body is read, since the connection could not be used again otherwise.
    let _ = request.into_body().collect().await;
    let mut response = Response::new(Full::new(Bytes::from_static(BODY)));
    let json = hyper::header::HeaderValue::from_static("application/json");
    response.headers_mut().insert(CONTENT_TYPE, json);
    Ok(response)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::dkc::RequestPlan;
    use crate::keys::{KeyDistribution, KeySpace};
    use crate::load::{self, LoadLimits, LoadPlan};

    #[test]
    fn it_answers_every_increment() {
        let url = client::Url::parse(&format!("http://{}", start().unwrap())).unwrap();
        let requests = RequestPlan {
            urls: vec![url],
            namespace: "bench".to_owned(),
            batch: 1,
            media: client::Media::Json,
            keyed: false,
            reads_percent: 0,
            staleness: None,
            keys: KeySpace::new(20, KeyDistribution::Each),
        };
        let plan = LoadPlan {
            clients: 3,
            threads: 1,
            rate: None,
            warm_up: Duration::ZERO,
            measured: Duration::from_secs(60),
            limits: LoadLimits::default(),
        };
        let measured = load::run(&plan, |number| requests.client(number), || (), || ()).unwrap();
        assert_eq!((measured.increments, measured.errors, measured.refused), (20, 0, 0));
    }
}
