//! The services of every gRPC port besides the role's own: health (`grpc.health.v1`) and
//! reflection, so that `grpcurl -plaintext ADDR list` works without a `.proto` file at hand.

use tonic::service::Routes;
use tonic_health::ServingStatus;
use tonic_health::server::{HealthReporter, health_reporter};
use tonic_reflection::server::Builder;

use crate::Health;

/// Returns the routes to begin a server with. `own` are the services that the role adds itself,
/// described in `descriptors` (an encoded `FileDescriptorSet`): each is SERVING while the process
/// is ready, and so is the process as a whole (service "").
///
/// Fails only if `descriptors` can't be decoded.
pub async fn grpc(
    health: &Health,
    descriptors: &[u8],
    own: &[&'static str],
) -> Result<Routes, tonic_reflection::server::Error> {
    // Services are listed by name: the descriptors also contain services of other roles, which are
    // not served here.
    let names = own.iter().copied().chain(["grpc.health.v1.Health"]);
    let reflection = |version: &str| {
        let described = Builder::configure()
            .register_encoded_file_descriptor_set(descriptors)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET);
        let reflection = format!("grpc.reflection.{version}.ServerReflection");
        names.clone().fold(described, Builder::with_service_name).with_service_name(reflection)
    };
    let (reporter, service) = health_reporter();
    let statuses: Vec<&str> = own.iter().copied().chain([""]).collect();
    // The status is set before the first request: the reporter begins with SERVING.
    let mut reason = health.watch();
    let ready = reason.borrow_and_update().is_none();
    report(&reporter, &statuses, ready).await;
    tokio::spawn(async move {
        while reason.changed().await.is_ok() {
            let ready = reason.borrow_and_update().is_none();
            report(&reporter, &statuses, ready).await;
        }
    });
    // Reflection is served in two versions: newer clients ask for v1, older ones only for v1alpha.
    Ok(Routes::new(service)
        .add_service(reflection("v1").build_v1()?)
        .add_service(reflection("v1alpha").build_v1alpha()?))
}

async fn report(reporter: &HealthReporter, services: &[&str], ready: bool) {
    let status = if ready { ServingStatus::Serving } else { ServingStatus::NotServing };
    for service in services {
        reporter.set_service_status(service, status).await;
    }
}
