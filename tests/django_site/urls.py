from django.urls import path

from django_site import views

urlpatterns = [
    path("stream/<str:subject>", views.stream),
    path("unseen/<str:subject>", views.unseen),
    path("plain/<str:subject>", views.plain),
    path("generator/<str:subject>", views.generator),
    path("raises/<str:subject>", views.raises),
    path("request/<str:subject>", views.request),
    path("state", views.state),
]
